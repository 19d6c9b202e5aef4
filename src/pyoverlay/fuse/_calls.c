/* Who watches the calls that change an upper: nobody, but for tests. See _calls.h. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_calls.h"

#include <errno.h>

static PyObject *watcher;                    /* set and used by the one thread that makes these calls */

/* 0, or the errno that the call is to fail with. */
static int watched(const char *name)
{
	PyGILState_STATE state = PyGILState_Ensure();
	PyObject *answer = PyObject_CallFunction(watcher, "s", name);
	int error = answer ? (int)PyLong_AsLong(answer) : EIO;

	if (PyErr_Occurred()) {
		PyErr_WriteUnraisable(watcher);
		error = EIO;
	}
	Py_XDECREF(answer);
	PyGILState_Release(state);
	return error;
}

bool may_call(const char *name)
{
	int error = watcher ? watched(name) : 0;

	if (error)
		errno = error;
	return !error;
}

PyObject *watch_calls(PyObject *self, PyObject *watch)
{
	PyObject *old = watcher;

	(void)self;
	watcher = watch == Py_None ? NULL : Py_NewRef(watch);
	Py_XDECREF(old);
	Py_RETURN_NONE;
}
