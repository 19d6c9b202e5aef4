"""Templates, and what docker prints for them: `docker context inspect -f TEMPLATE default`, which needs no engine.

`VALUE` is what that command's templates are about, as far as they are used here.
"""

from __future__ import annotations

from typing import Any

VALUE: dict[str, Any] = {
    "Name": "default",
    "Metadata": {},
    "Endpoints": {"docker": {"Host": "unix:///var/run/docker.sock", "SkipTLSVerify": False}},
    "TLSMaterial": {},
    "Storage": {"MetadataPath": "<IN MEMORY>", "TLSPath": "<IN MEMORY>"},
}

# Each template, and its text.
PRINTED = [
    ("plain text", "plain text"),
    ("{{.Name}}", "default"),
    ("a {{.Name}} b {{ .Name }} c", "a default b default c"),
    ("{{.Endpoints.docker.Host}}", "unix:///var/run/docker.sock"),
    ("{{.Endpoints.docker.SkipTLSVerify}}", "false"),
    ("{{(index .Endpoints \"docker\").Host}}", "unix:///var/run/docker.sock"),
    ("{{$.Name}}", "default"),
    ("{{with .Endpoints.docker}}{{.Host}} {{$.Name}}{{end}}", "unix:///var/run/docker.sock default"),
    ("{{with .TLSMaterial}}yes{{else}}no{{end}}", "no"),
    ("{{with $x := .Name}}{{$x}}/{{.}}{{end}}", "default/default"),
    # pipelines and variables
    ("{{.Name | upper}}", "DEFAULT"),
    ("{{.Name | printf \"%s-%s\" \"a\"}}", "a-default"),
    ("{{.Name | upper | lower | title}}", "Default"),
    ("{{$a := \"x\"}}{{$a}}{{$a = \"y\"}}{{$a}}", "xy"),
    ("{{$a := 1}}{{if true}}{{$a := 2}}{{$a}}{{end}}{{$a}}", "21"),
    ("{{$a := 1}}{{if true}}{{$a = 2}}{{end}}{{$a}}", "2"),
    # if, else, and what is true
    ("{{if .Name}}t{{else}}f{{end}}", "t"),
    ("{{if \"\"}}t{{else}}f{{end}}", "f"),
    ("{{if 0}}t{{else}}f{{end}}{{if 0.0}}t{{else}}f{{end}}{{if 1}}t{{end}}", "fft"),
    ("{{if .TLSMaterial}}t{{else}}f{{end}}", "f"),
    ("{{if false}}a{{else if true}}b{{else}}c{{end}}", "b"),
    ("{{if false}}a{{else if false}}b{{else}}c{{end}}", "c"),
    ("{{if and .Name .Endpoints}}t{{end}}", "t"),
    ("{{and 1 0 2}} {{and 1 2}} {{or 0 \"\" \"x\" \"y\"}} {{or 0 false}} {{not 1}} {{not \"\"}}", "0 2 x false false true"),
    # comparisons
    ("{{eq 1 1}} {{eq 1 2}} {{eq \"a\" \"b\" \"a\"}} {{ne 1 2}} {{ne \"a\" \"a\"}}", "true false true true false"),
    ("{{lt 1 2}} {{le 2 2}} {{gt 1 2}} {{ge 2 3}} {{lt \"a\" \"b\"}}", "true true false false true"),
    ("{{eq .Name \"default\"}}", "true"),
    # range
    ("{{range split \"a:b:c\" \":\"}}[{{.}}]{{end}}", "[a][b][c]"),
    ("{{range $i, $e := split \"a:b\" \":\"}}{{if $i}}, {{end}}{{$i}}={{$e}}{{end}}", "0=a, 1=b"),
    ("{{range $e := split \"a:b\" \":\"}}{{$e}}{{end}}", "ab"),
    ("{{range $k, $v := .Endpoints}}{{$k}}: {{$v.Host}}{{end}}", "docker: unix:///var/run/docker.sock"),
    ("{{range .TLSMaterial}}x{{else}}empty{{end}}", "empty"),
    ("{{range split \"a:b:c:d\" \":\"}}{{if eq . \"b\"}}{{continue}}{{end}}{{if eq . \"d\"}}{{break}}{{end}}{{.}}{{end}}", "ac"),
    # numbers, strings and characters
    ("{{1}} {{-2}} {{0x10}} {{1.5}} {{2e3}} {{1_000}} {{'a'}} {{true}}", "1 -2 16 1.5 2000 1000 97 true"),
    ("{{\"a\\tb\\\"c\\u00e9\\x41\\101\"}}", "a\tb\"céAA"),
    ("{{`raw \\n \"text\"`}}", "raw \\n \"text\""),
    # trimming and comments
    ("a  {{- \"b\" -}}  c", "abc"),
    ("a \n {{- .Name}} b", "adefault b"),
    ("a{{/* a comment */}}b {{- /* and another */ -}} c", "abc"),
    ("{{\"{{\"}} }}", "{{ }}"),
    # functions of Go
    ("{{len .Name}} {{len \"é\"}} {{len (split \"a:b\" \":\")}}", "7 2 2"),
    ("{{index (split \"a:b:c\" \":\") 1}}", "b"),
    ("{{slice \"abcdef\" 1 3}} {{slice \"abc\" 1}} {{slice (split \"a:b:c\" \":\") 1}}", "bc bc [b c]"),
    # strings are made of bytes
    ("{{index \"abc\" 1}} {{slice \"né\" 0 3}} {{slice \"né\" 1 (len \"né\")}} {{truncate \"né\" 3}}", "98 né é né"),
    ("{{\"\\xc3\\xa9\"}} {{\"\\303\\251\"}} {{len \"\\xff\"}} {{'\\xff'}} {{printf \"%x\" \"\\xff\"}}", "é é 1 255 ff"),
    ("{{printf \"%c\" (index \"abc\" 1)}}{{printf \"%c\" 55296}}{{printf \"%c\" 99999999}}", "b" + 2 * "\N{REPLACEMENT CHARACTER}"),
    ("{{print \"a\" \"b\" 1 2 \"c\" 3}}", "ab1 2c3"),
    ("{{print 1 2}}|{{print \"a\" 1}}|{{print true false}}", "1 2|a1|true false"),
    ("{{println \"a\" 1 \"b\"}}", "a 1 b\n"),
    ("a{{println}}b", "a\nb"),
    ("{{printf \"%d %s %v %t %q\" 1 \"a\" \"b\" true \"c\"}}", "1 a b true \"c\""),
    ("{{printf \"%5d|%-5d|%05d|%+d\" 42 42 42 42}}", "   42|42   |00042|+42"),
    ("{{printf \"%10s|%-10s|%.2s\" \"abc\" \"abc\" \"abc\"}}", "       abc|abc       |ab"),
    ("{{printf \"%x %X %o %b %c\" 255 255 8 5 97}}", "ff FF 10 101 a"),
    ("{{printf \"%.2f %6.1f\" 1.555 2.25}}", "1.55    2.2"),
    ("{{printf \"100%% %s\" \"x\"}}", "100% x"),
    ("{{printf \"%d\" \"a\"}}|{{printf \"%s\" 1}}|{{printf \"%s\"}}", "%!d(string=a)|%!s(int=1)|%!s(MISSING)"),
    ("{{printf \"%s\" \"a\" \"b\"}}", "a%!(EXTRA string=b)"),
    ("{{printf \"%v %s\" (split \"a:b\" \":\") (split \"c\" \":\")}}", "[a b] [c]"),
    ("{{split \"a:b\" \":\"}}", "[a b]"),
    # functions of docker
    ("{{json .Name}} {{json (split \"a:b\" \":\")}} {{json 1}} {{json true}}", "\"default\" [\"a\",\"b\"] 1 true"),
    ("{{json \"<a&é>\"}}", "\"<a&é>\""),
    ("{{join (split \"a:b:c\" \":\") \"/\"}}", "a/b/c"),
    ("{{split \"abc\" \"\"}}", "[a b c]"),
    ("{{title \"two words\"}} {{lower \"ABC\"}} {{upper \"abc\"}}", "Two Words abc ABC"),
    ("[{{pad \"a\" 1 2}}][{{pad \"\" 1 2}}]", "[ a  ][]"),
    ("{{truncate \"abcdef\" 3}} {{truncate \"ab\" 3}}", "abc ab"),
    ("{{json .Endpoints.docker.Host}}", "\"unix:///var/run/docker.sock\""),
]  # fmt: skip

# What no template is: docker exits with 1, or 64, and we with 2.
MALFORMED = [
    "{{", "{{.Name", "{{.Name}", "{{if .Name}}x", "{{end}}", "{{else}}", "{{range}}{{end}}", "{{nope}}", "{{$x}}",
    "{{.Name | \"a\"}}", "{{(.Name}}", "{{.Name)}}", "{{\"a}}", "{{if}}x{{end}}", "{{if true}}a{{else}}b{{else}}c{{end}}", "{{break}}",
    "{{\"\\ud800\"}}", "{{\"\\U00110000\"}}", "{{'\\ud800'}}", "{{\"\\400\"}}",
    "{{1 2}}", "{{$a, $b := 1}}", "{{}}", "{{\"\\z\"}}", "{{'ab'}}", "{{.Name .Name .Name.}}", "{{with .Name}}a", "{{#}}",
    "{{$x = 1}}", "{{if true}}{{$y := 1}}{{end}}{{$y}}",
]  # fmt: skip

# What parses, and cannot be carried out on VALUE: exit 1 for both.
FAILING = [
    "{{.Nope}}", "{{.Name.Nope}}", "{{index .Name \"a\"}}", "{{index (split \"a\" \":\") 3}}", "{{len 1}}", "{{lt 1 \"a\"}}",
    "{{eq 1 \"1\"}}", "{{slice 1}}", "{{join \"a\" \",\"}}", "{{upper 1}}", "{{range 1.5}}{{end}}", "{{len}}", "{{upper \"a\" \"b\"}}",
    "{{printf 1}}", "{{eq 1}}", "{{and}}", "{{slice \"abc\" 2 1}}",
]  # fmt: skip
