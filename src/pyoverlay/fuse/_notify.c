/* Notifications: what the daemon tells the kernel without being asked. _wire.pyi says what each does. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_notify.h"
#include "_protocol.h"
#include "_receive.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTIFY_INVAL_INODE = 2, NOTIFY_INVAL_ENTRY = 3, NOTIFY_PRUNE = 9 };

/* A duplicate, taken under the GIL as destroy runs under it: the number cannot become another file's while the GIL is released. The write
 * may wait for requests about the same inode, and so must not be made by the thread that answers them. */
static PyObject *notify(int code, const void *fixed, size_t fixed_size, const void *tail, size_t tail_size)
{
	int device = receiving_device() < 0 ? -1 : fcntl(receiving_device(), F_DUPFD_CLOEXEC, 3);
	struct out_header head = { (uint32_t)(sizeof head + fixed_size + tail_size), code, 0 };
	struct iovec iov[3] = { { &head, sizeof head }, { (void *)fixed, fixed_size }, { (void *)tail, tail_size } };
	ssize_t n;
	int error;

	if (device < 0) {
		errno = receiving_device() < 0 ? ENOTCONN : errno;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_BEGIN_ALLOW_THREADS
	n = writev(device, iov, 3);
	error = errno;
	close(device);
	Py_END_ALLOW_THREADS
	if (n < 0) {
		errno = error;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_RETURN_NONE;
}

PyObject *notify_inval_inode(PyObject *self, PyObject *args)
{
	unsigned long long node;
	long long offset, length;

	(void)self;
	if (!PyArg_ParseTuple(args, "KLL", &node, &offset, &length))
		return NULL;
	struct { uint64_t node; int64_t offset, length; } body = { node, offset, length };
	return notify(NOTIFY_INVAL_INODE, &body, sizeof body, NULL, 0);
}

PyObject *notify_inval_entry(PyObject *self, PyObject *args)
{
	unsigned long long parent;
	const char *name;
	Py_ssize_t length;

	(void)self;
	if (!PyArg_ParseTuple(args, "Ky#", &parent, &name, &length))
		return NULL;
	if (length > 255 || memchr(name, 0, (size_t)length)) {
		PyErr_SetString(PyExc_ValueError, "not a file name");
		return NULL;
	}
	struct { uint64_t parent; uint32_t length, flags; } body = { parent, (uint32_t)length, 0 };
	return notify(NOTIFY_INVAL_ENTRY, &body, sizeof body, name, (size_t)length + 1);     /* bytes objects end with a NUL */
}

PyObject *notify_prune(PyObject *self, PyObject *nodes)
{
	PyObject *list = PySequence_List(nodes), *result = NULL;

	(void)self;
	if (!list)
		return NULL;
	Py_ssize_t count = PyList_Size(list);
	uint64_t *ids = malloc((size_t)count * sizeof *ids + 1);
	for (Py_ssize_t i = 0; ids && i < count && !PyErr_Occurred(); i++)
		ids[i] = PyLong_AsUnsignedLongLong(PyList_GetItem(list, i));
	struct { uint32_t count, padding; uint64_t spare; } body = { (uint32_t)count, 0, 0 };
	if (!ids)
		PyErr_NoMemory();
	else if (!PyErr_Occurred())
		result = notify(NOTIFY_PRUNE, &body, sizeof body, ids, (size_t)count * sizeof *ids);
	free(ids);
	Py_DECREF(list);
	return result;
}
