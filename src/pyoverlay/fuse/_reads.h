/* The calls of core/reads.py, and the Stat that they return; used by _wire.c, _direct.c and from Python. */
#ifndef PYOVERLAY_READS_H
#define PYOVERLAY_READS_H

#include <Python.h>

#include "_lane.h"

/* Makes the type. 0, or -1 with an exception set. */
int reads_prepare(void);
/* A Stat; NULL with an exception set. */
PyObject *reads_stat(const struct stat *st);
/* The attributes in a Stat; NULL: it is none. */
const struct attr *reads_attributes(PyObject *object);

PyObject *reads_lstat(PyObject *self, PyObject *const *arguments, Py_ssize_t count);
PyObject *reads_lstat_all(PyObject *self, PyObject *const *arguments, Py_ssize_t count);
PyObject *reads_fstat(PyObject *self, PyObject *fd);
PyObject *reads_readlink(PyObject *self, PyObject *const *arguments, Py_ssize_t count);
/* See core/reads.py. -1 and errno. Needs no GIL. */
int open_regular(int dirfd, const char *name, int flags);

PyObject *reads_open_regular(PyObject *self, PyObject *const *arguments, Py_ssize_t count);
PyObject *reads_getxattr(PyObject *self, PyObject *const *arguments, Py_ssize_t count);
PyObject *reads_find_xattr(PyObject *self, PyObject *const *arguments, Py_ssize_t count);
PyObject *reads_find_xattr_of(PyObject *self, PyObject *const *arguments, Py_ssize_t count);
PyObject *reads_listxattr(PyObject *self, PyObject *const *arguments, Py_ssize_t count);
PyObject *reads_scan(PyObject *self, PyObject *const *arguments, Py_ssize_t count);

#endif
