/* The calls by which layers are read, for core/reads.py: no exception for a name that is not there, and no Python object for what nobody
 * looks at.
 *
 * os.stat() takes 2 µs where the system call takes half of one: 19 numbers in a tuple, three of them floats. A Stat keeps what the call
 * said in the layout of the kernel's protocol, makes a number of what is asked for, and goes into a reply as it is.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "_reads.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/limits.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

enum {
	SECOND = 1000000000,                 /* ns */
	FIRST_ROOM = 256,                    /* bytes for what a call gives; where that is too little the call is made again */
	SYS_GETXATTRAT = 464, SYS_LISTXATTRAT = 465,                       /* Linux 6.13 */
};

typedef struct {
	PyObject_HEAD
	struct attr attr;
	uint64_t dev, rdev;
} Stat;

static PyObject *stat_type;

/* ---- the object ---- */

static PyObject *nanoseconds(uint64_t seconds, uint32_t rest)
{
	long long whole, result;

	if (!__builtin_mul_overflow((long long)seconds, (long long)SECOND, &whole) && !__builtin_add_overflow(whole, (long long)rest, &result))
		return PyLong_FromLongLong(result);
	PyObject *factor = PyLong_FromLong(SECOND), *count = PyLong_FromLongLong((long long)seconds), *more = PyLong_FromUnsignedLong(rest);
	PyObject *product = factor && count ? PyNumber_Multiply(count, factor) : NULL;
	PyObject *sum = product && more ? PyNumber_Add(product, more) : NULL;
	Py_XDECREF(factor);
	Py_XDECREF(count);
	Py_XDECREF(more);
	Py_XDECREF(product);
	return sum;
}

static PyObject *atime(PyObject *self, void *unused)
{
	(void)unused;
	return nanoseconds(((Stat *)self)->attr.atime, ((Stat *)self)->attr.atimensec);
}

static PyObject *mtime(PyObject *self, void *unused)
{
	(void)unused;
	return nanoseconds(((Stat *)self)->attr.mtime, ((Stat *)self)->attr.mtimensec);
}

static PyObject *ctime_(PyObject *self, void *unused)
{
	(void)unused;
	return nanoseconds(((Stat *)self)->attr.ctime, ((Stat *)self)->attr.ctimensec);
}

static void deallocate(PyObject *self)
{
	PyTypeObject *type = Py_TYPE(self);
	PyObject_Free(self);
	Py_DECREF(type);
}

static PyMemberDef members[] = {
	{ "st_mode", T_UINT, offsetof(Stat, attr.mode), READONLY, NULL },
	{ "st_ino", T_ULONGLONG, offsetof(Stat, attr.ino), READONLY, NULL },
	{ "st_dev", T_ULONGLONG, offsetof(Stat, dev), READONLY, NULL },
	{ "st_nlink", T_UINT, offsetof(Stat, attr.nlink), READONLY, NULL },
	{ "st_uid", T_UINT, offsetof(Stat, attr.uid), READONLY, NULL },
	{ "st_gid", T_UINT, offsetof(Stat, attr.gid), READONLY, NULL },
	{ "st_size", T_ULONGLONG, offsetof(Stat, attr.size), READONLY, NULL },
	{ "st_blocks", T_ULONGLONG, offsetof(Stat, attr.blocks), READONLY, NULL },
	{ "st_blksize", T_UINT, offsetof(Stat, attr.blksize), READONLY, NULL },
	{ "st_rdev", T_ULONGLONG, offsetof(Stat, rdev), READONLY, NULL },
	{ NULL, 0, 0, 0, NULL },
};

static PyGetSetDef times[] = {
	{ "st_atime_ns", atime, NULL, NULL, NULL },
	{ "st_mtime_ns", mtime, NULL, NULL, NULL },
	{ "st_ctime_ns", ctime_, NULL, NULL, NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot slots[] = {
	{ Py_tp_members, members },
	{ Py_tp_getset, times },
	{ Py_tp_dealloc, deallocate },
	{ 0, NULL },
};

static PyType_Spec spec = {
	"pyoverlay.fuse._wire.Stat", sizeof(Stat), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots,
};

int reads_prepare(void)
{
	if (!stat_type)
		stat_type = PyType_FromSpec(&spec);
	return stat_type ? 0 : -1;
}

const struct attr *reads_attributes(PyObject *object)
{
	return (PyObject *)Py_TYPE(object) == stat_type ? &((Stat *)object)->attr : NULL;
}

static void fill(Stat *made, const struct stat *st)
{
	attributes_of(st, &made->attr);
	made->dev = st->st_dev;
	made->rdev = st->st_rdev;
}

PyObject *reads_stat(const struct stat *st)
{
	Stat *made = PyObject_New(Stat, (PyTypeObject *)stat_type);

	if (made)
		fill(made, st);
	return (PyObject *)made;
}

/* ---- the calls ---- */

static bool takes(Py_ssize_t wanted, Py_ssize_t count)
{
	if (count != wanted)
		PyErr_Format(PyExc_TypeError, "%zd arguments are wanted, not %zd", wanted, count);
	return count == wanted;
}

static bool take_number(PyObject *object, int *number)
{
	*number = (int)PyLong_AsLong(object);
	return *number != -1 || !PyErr_Occurred();
}

/* The first two arguments: a directory's descriptor and a name. False with an exception set. */
static bool take_place(PyObject *const *arguments, Py_ssize_t count, Py_ssize_t wanted, int *dirfd, char **name)
{
	return takes(wanted, count) && take_number(arguments[0], dirfd) && PyBytes_AsStringAndSize(arguments[1], name, NULL) == 0;
}

PyObject *reads_lstat(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	struct stat st;
	char *name;
	int dirfd, result;

	(void)self;
	if (!take_place(arguments, count, 2, &dirfd, &name))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW);
	Py_END_ALLOW_THREADS
	if (result == 0)
		return reads_stat(&st);
	if (errno == ENOENT || errno == ENAMETOOLONG)
		Py_RETURN_NONE;
	return PyErr_SetFromErrno(PyExc_OSError);
}

struct named {
	const char *name;
	Stat *st;                            /* of the list that is returned; NULL: there is nothing to say */
};

/* A Stat for each name of a list, still empty, in a new list; NULL with an exception set. */
static PyObject *stats_for(PyObject *names, struct named *all, Py_ssize_t count)
{
	PyObject *stats = PyList_New(count);

	for (Py_ssize_t i = 0; stats && i < count; i++) {
		char *name;
		if (PyBytes_AsStringAndSize(PyList_GetItem(names, i), &name, NULL) < 0
			|| !(all[i].st = PyObject_New(Stat, (PyTypeObject *)stat_type))
			|| PyList_SetItem(stats, i, (PyObject *)all[i].st) < 0)
			Py_CLEAR(stats);
		else
			all[i].name = name;
	}
	return stats;
}

/* With the GIL released once for all of them. */
PyObject *reads_lstat_all(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	struct stat st;
	int dirfd = -1;

	(void)self;
	if (!takes(2, count) || !PyList_Check(arguments[1]))
		return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "a list of names is wanted");
	Py_ssize_t names = PyList_Size(arguments[1]);
	struct named *all = malloc((size_t)(names + 1) * sizeof *all);
	PyObject *stats = !all ? PyErr_NoMemory() : take_number(arguments[0], &dirfd) ? stats_for(arguments[1], all, names) : NULL;
	if (stats) {
		Py_BEGIN_ALLOW_THREADS
		for (Py_ssize_t i = 0; i < names; i++) {
			if (fstatat(dirfd, all[i].name, &st, AT_SYMLINK_NOFOLLOW) == 0)
				fill(all[i].st, &st);
			else
				all[i].st = NULL;
		}
		Py_END_ALLOW_THREADS
	}
	for (Py_ssize_t i = 0; stats && i < names; i++)
		if (!all[i].st && PyList_SetItem(stats, i, Py_NewRef(Py_None)) < 0)
			Py_CLEAR(stats);
	free(all);
	return stats;
}

PyObject *reads_fstat(PyObject *self, PyObject *fd)
{
	struct stat st;
	int number, result;

	(void)self;
	if (!take_number(fd, &number))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = fstat(number, &st);
	Py_END_ALLOW_THREADS
	return result == 0 ? reads_stat(&st) : PyErr_SetFromErrno(PyExc_OSError);
}

PyObject *reads_readlink(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	char *name, target[PATH_MAX];
	int dirfd;
	ssize_t length;

	(void)self;
	if (!take_place(arguments, count, 2, &dirfd, &name))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	length = readlinkat(dirfd, name, target, sizeof target);
	Py_END_ALLOW_THREADS
	return length < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyBytes_FromStringAndSize(target, length);
}

int open_regular(int dirfd, const char *name, int flags)
{
	int fd = -1, pin = openat(dirfd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	char path[32];
	struct stat st;

	if (pin < 0)
		return -1;
	snprintf(path, sizeof path, "/proc/self/fd/%d", pin);
	errno = ESTALE;
	if (fstat(pin, &st) == 0 && S_ISREG(st.st_mode)) {
		do
			fd = open(path, flags | O_CLOEXEC);
		while (fd < 0 && errno == EINTR);
	}
	int error = errno;
	close(pin);
	errno = error;
	return fd;
}

PyObject *reads_open_regular(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	char *name;
	int dirfd, flags, fd;

	(void)self;
	if (!take_place(arguments, count, 3, &dirfd, &name) || !take_number(arguments[2], &flags))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	fd = open_regular(dirfd, name, flags);
	Py_END_ALLOW_THREADS
	return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}

/* ---- extended attributes ---- */

/* What is asked for an attribute, or for the list of them: a name in a directory; with no name the object of the descriptor, which may be one
 * that reads nothing; with AT_EMPTY_PATH that of a descriptor that does. */
struct question {
	int fd;
	const char *name, *attribute;        /* no attribute: the list */
	bool is_open;
};

static ssize_t ask_at(const struct question *q, void *value, size_t size)
{
	struct { uint64_t value; uint32_t size, flags; } out = { (uintptr_t)value, (uint32_t)size, 0 };

	if (q->attribute)
		return syscall(SYS_GETXATTRAT, q->fd, q->name, AT_SYMLINK_NOFOLLOW, q->attribute, &out, sizeof out);
	return syscall(SYS_LISTXATTRAT, q->fd, q->name, AT_SYMLINK_NOFOLLOW, value, size);
}

static ssize_t ask_by_path(const struct question *q, void *value, size_t size)
{
	char path[64 + NAME_MAX + 1];

	if (!*q->name) {                     /* the link is followed to where the descriptor leads, and no further */
		snprintf(path, sizeof path, "/proc/self/fd/%d", q->fd);
		return q->attribute ? getxattr(path, q->attribute, value, size) : listxattr(path, value, size);
	}
	if (snprintf(path, sizeof path, "/proc/self/fd/%d/%s", q->fd, q->name) >= (int)sizeof path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	return q->attribute ? lgetxattr(path, q->attribute, value, size) : llistxattr(path, value, size);
}

/* The calls that take a directory cost a third of the way through /proc. An older kernel has none, and a container's filter may know none. */
static ssize_t ask(const struct question *q, void *value, size_t size)
{
	static bool is_missing;

	if (q->is_open)
		return q->attribute ? fgetxattr(q->fd, q->attribute, value, size) : flistxattr(q->fd, value, size);
	if (*q->name && !is_missing) {
		ssize_t length = ask_at(q, value, size);
		if (length >= 0 || (errno != ENOSYS && errno != EPERM))
			return length;
		is_missing = errno == ENOSYS;
	}
	return ask_by_path(q, value, size);
}

/* The answer and a NUL, in `first` or in memory to be freed; its length or -errno. */
static ssize_t whole_answer(const struct question *q, char *first, char **answer)
{
	ssize_t length;

	*answer = first;
	Py_BEGIN_ALLOW_THREADS
	length = ask(q, first, FIRST_ROOM);
	if (length < 0 && errno == ERANGE && (*answer = malloc(XATTR_SIZE_MAX + 1)))
		length = ask(q, *answer, XATTR_SIZE_MAX);
	length = length < 0 ? -errno : length;
	Py_END_ALLOW_THREADS
	if (length >= 0)
		(*answer)[length] = '\0';   /* a list whose server left out the last one ends here */
	return length;
}

static PyObject *answer_of(const struct question *q, bool is_none_without, PyObject *(*made)(const char *, Py_ssize_t))
{
	char first[FIRST_ROOM + 1], *answer;
	ssize_t length = whole_answer(q, first, &answer);
	PyObject *result = NULL;

	if (length >= 0) {
		result = made(answer, length);
	} else if (is_none_without && (length == -ENODATA || length == -EOPNOTSUPP)) {
		result = Py_NewRef(Py_None);
	} else {
		errno = (int)-length;
		PyErr_SetFromErrno(PyExc_OSError);
	}
	if (answer != first)
		free(answer);
	return result;
}

static PyObject *names_of(const char *list, Py_ssize_t size)
{
	PyObject *names = PyList_New(0);

	for (const char *name = list; names && name < list + size; name += strlen(name) + 1) {
		PyObject *one = PyBytes_FromString(name);
		if (!one || PyList_Append(names, one) < 0)
			Py_CLEAR(names);
		Py_XDECREF(one);
	}
	return names;
}

static PyObject *get_xattr(PyObject *const *arguments, Py_ssize_t count, bool is_none_without)
{
	struct question q = { 0 };
	char *name, *attribute;

	if (!take_place(arguments, count, 3, &q.fd, &name) || PyBytes_AsStringAndSize(arguments[2], &attribute, NULL) < 0)
		return NULL;
	q.name = name;
	q.attribute = attribute;
	return answer_of(&q, is_none_without, PyBytes_FromStringAndSize);
}

PyObject *reads_getxattr(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	(void)self;
	return get_xattr(arguments, count, false);
}

PyObject *reads_find_xattr(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	(void)self;
	return get_xattr(arguments, count, true);
}

PyObject *reads_find_xattr_of(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	struct question q = { .is_open = true };
	char *attribute;

	(void)self;
	if (!take_place(arguments, count, 2, &q.fd, &attribute))
		return NULL;
	q.attribute = attribute;
	return answer_of(&q, true, PyBytes_FromStringAndSize);
}

PyObject *reads_listxattr(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	struct question q = { 0 };
	char *name;

	(void)self;
	if (!take_place(arguments, count, 2, &q.fd, &name))
		return NULL;
	q.name = name;
	PyObject *names = answer_of(&q, true, names_of);
	if (names == Py_None) {
		Py_DECREF(names);
		return PyList_New(0);
	}
	return names;
}

/* ---- directories ---- */

static PyObject *format_of(unsigned char type)
{
	static PyObject *formats[4];         /* a number of each, for all entries */
	static const long values[4] = { 0, S_IFDIR, S_IFLNK, S_IFREG };
	int which = type == DT_DIR ? 1 : type == DT_LNK ? 2 : type == DT_REG ? 3 : 0;

	if (!formats[which])
		formats[which] = PyLong_FromLong(values[which]);
	return formats[which];
}

struct entry64 {                             /* struct linux_dirent64 */
	uint64_t ino, offset;
	unsigned short length;
	unsigned char type;
	char name[];
};

static bool add_entries(PyObject *names, const char *buffer, ssize_t size)
{
	for (const char *at = buffer; at < buffer + size;) {
		const struct entry64 *entry = (const void *)at;
		at += entry->length;
		if (strcmp(entry->name, ".") == 0 || strcmp(entry->name, "..") == 0)
			continue;
		PyObject *name = PyBytes_FromString(entry->name), *format = format_of(entry->type);
		bool added = name && format && PyDict_SetItem(names, name, format) == 0;
		Py_XDECREF(name);
		if (!added)
			return false;
	}
	return true;
}

static PyObject *names_in(int fd)
{
	enum { ROOM = 32 << 10 };
	ssize_t size = 0;
	char *buffer = malloc(ROOM);
	PyObject *names = buffer ? PyDict_New() : PyErr_NoMemory();

	while (names) {
		Py_BEGIN_ALLOW_THREADS
		size = syscall(SYS_getdents64, fd, buffer, ROOM);
		Py_END_ALLOW_THREADS
		if (size == 0)
			break;
		if (size < 0)
			PyErr_SetFromErrno(PyExc_OSError);
		if (size < 0 || !add_entries(names, buffer, size))
			Py_CLEAR(names);
	}
	free(buffer);
	return names;
}

PyObject *reads_scan(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	int dirfd, flags, fd;

	(void)self;
	if (!takes(2, count) || !take_number(arguments[0], &dirfd) || !take_number(arguments[1], &flags))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	fd = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC | flags);
	Py_END_ALLOW_THREADS
	if (fd < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	PyObject *names = names_in(fd);
	close(fd);
	return names;
}
