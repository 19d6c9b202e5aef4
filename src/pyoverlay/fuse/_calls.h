/* Changes of the upper that are several system calls and one call of Python's, as methods of the module; used by _wire.c alone.
 *
 * The seam of core/calls.py goes through here: each call that changes something, or puts it on disk, is made behind may_call(), and a test
 * that watches counts it, has it fail, or ends the process there. So are those that read, where many follow each other.
 */
#ifndef PYOVERLAY_CALLS_H
#define PYOVERLAY_CALLS_H

#include <Python.h>

#include <stdbool.h>

/* To be asked right before each such call, with the name that its method has in core/calls.py; one that reads has its own. False: it is not to be made, and errno says
 * with what it failed. Needs no GIL. */
bool may_call(const char *name);

PyObject *watch_calls(PyObject *self, PyObject *watch);
PyObject *copy_up_file(PyObject *self, PyObject *args);
PyObject *make_for_caller(PyObject *self, PyObject *args);

#endif
