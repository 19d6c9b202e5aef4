"""Templates for `--format`: Go's text/template, as much of it as docker's commands are used with, over plain values.

    {{.GraphDriver.Data.UpperDir}}      {{range .Mounts}}{{.Merged}} {{.State}}{{println}}{{end}}
    {{json .Options}}                   {{with .Upper}}upper={{.}}{{else}}read-only{{end}}
    {{index .Lowers 0 | upper}}         {{if and .Running (gt .Pid 1)}}{{printf "%-20s %d" .Merged .Pid}}{{end}}

What there is: text, `{{-` and `-}}`, comments, fields, variables, pipelines, parentheses, if, else if, else, with, range, break, continue;
`and or not eq ne lt le gt ge len index slice print printf println` of Go and `json split join title lower upper pad truncate` of docker.
What there is not, and is refused: define, template, block, methods and complex numbers.

Values are what JSON knows: None, bool, int, float, str, lists and dicts with str keys. A field is a key; one that is not there is an error
that lists the ones that are, where docker prints `<no value>`.
"""

from pyoverlay.report.template.execution import Template
from pyoverlay.report.template.failures import TemplateFailedError, TemplateSyntaxError

__all__ = ["Template", "TemplateFailedError", "TemplateSyntaxError"]
