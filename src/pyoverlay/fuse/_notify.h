/* Notifications, as methods of the module; used by _wire.c alone. */
#ifndef PYOVERLAY_NOTIFY_H
#define PYOVERLAY_NOTIFY_H

#include <Python.h>

PyObject *notify_inval_inode(PyObject *self, PyObject *args);
PyObject *notify_inval_entry(PyObject *self, PyObject *args);
PyObject *notify_prune(PyObject *self, PyObject *nodes);

#endif
