/* Requests answered by one plain Python call each, without pyfuse3. See _direct.h.
 *
 * What the kernel sends is taken apart here and what it gets is put together here, so that the function in between has numbers and bytes
 * to deal with and nothing else: no task, no object for the request, none for the reply. Layouts are those of <linux/fuse.h>.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_direct.h"
#include "_reads.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { LARGEST_REPLY = 1 << 20, DIRENT_AT = sizeof(struct entry_out), NAME_AT = DIRENT_AT + sizeof(struct dirent_out) };
enum {                                       /* os.stat_result: its tuple, times as floats, then what the tuple lacks */
	ST_MODE = 0, ST_NLINK = 3, ST_UID = 4, ST_GID = 5, ST_SIZE = 6, ST_ATIME_NS = 13, ST_MTIME_NS = 14, ST_CTIME_NS = 15, ST_BLKSIZE = 16,
	ST_BLOCKS = 17, ST_RDEV = 18,
};

static PyObject *handlers[OPCODES];
static uint64_t answered;

int direct_set(PyObject *wanted)
{
	PyObject *fresh[OPCODES] = { NULL }, *opcode, *handler;
	Py_ssize_t at = 0;

	while (wanted && PyDict_Next(wanted, &at, &opcode, &handler)) {
		long number = PyLong_AsLong(opcode);
		if (number < 0 || number >= OPCODES) {
			if (!PyErr_Occurred())
				PyErr_Format(PyExc_ValueError, "no such opcode: %ld", number);
			return -1;
		}
		fresh[number] = handler;
	}
	for (int i = 0; i < OPCODES; i++) {
		PyObject *old = handlers[i];
		Py_XINCREF(fresh[i]);
		handlers[i] = fresh[i];
		Py_XDECREF(old);
	}
	answered = 0;
	return 0;
}

bool direct_has(uint32_t opcode) { return opcode < OPCODES && handlers[opcode]; }
uint64_t direct_answered(void) { return answered; }

/* ---- from the request to the call ---- */

/* The name at an offset of the body; *next is what follows its NUL. The receiver keeps zeros behind every request. */
static const char *name_at(const struct request *r, size_t at, const char **next)
{
	const char *name = body_of(r) + (at < body_size(r) ? at : body_size(r));
	if (next)
		*next = name + strlen(name) + 1;
	return name;
}

static PyObject *name_object(const struct request *r, size_t at)
{
	return PyBytes_FromString(name_at(r, at, NULL));
}

/* A call with one to three arguments, which are taken over; NULL ends them. A format would be parsed anew with every request. */
static PyObject *call_with(PyObject *f, PyObject *first, PyObject *second, PyObject *third)
{
	PyObject *result = first && !PyErr_Occurred() ? PyObject_CallFunctionObjArgs(f, first, second, third, NULL) : NULL;

	Py_XDECREF(first);
	Py_XDECREF(second);
	Py_XDECREF(third);
	return result;
}

static PyObject *number(uint64_t value)
{
	return PyLong_FromUnsignedLongLong(value);
}

static PyObject *call_setattr(PyObject *f, const struct request *r)
{
	const struct setattr_in *in = (const void *)body_of(r);

	return PyObject_CallFunction(f, "KIIIIKLILI", (unsigned long long)header_of(r)->nodeid, in->valid, in->mode, in->uid, in->gid,
		(unsigned long long)in->size, (long long)in->atime, in->atimensec, (long long)in->mtime, in->mtimensec);
}

static PyObject *call_mknod(PyObject *f, const struct request *r)
{
	const struct in_header *h = header_of(r);
	const struct mknod_in *in = (const void *)body_of(r);

	return PyObject_CallFunction(f, "KyIIIII", (unsigned long long)h->nodeid, name_at(r, sizeof *in, NULL), in->mode, in->rdev, h->uid, h->gid,
		in->umask);
}

static PyObject *call_mkdir(PyObject *f, const struct request *r)
{
	const struct in_header *h = header_of(r);
	const struct mkdir_in *in = (const void *)body_of(r);

	return PyObject_CallFunction(f, "KyIIII", (unsigned long long)h->nodeid, name_at(r, sizeof *in, NULL), in->mode, h->uid, h->gid, in->umask);
}

static PyObject *call_symlink(PyObject *f, const struct request *r)
{
	const struct in_header *h = header_of(r);
	const char *target, *name = name_at(r, 0, &target);

	return PyObject_CallFunction(f, "KyyII", (unsigned long long)h->nodeid, name, target, h->uid, h->gid);
}

static PyObject *call_rename(PyObject *f, const struct request *r)
{
	bool has_flags = header_of(r)->opcode == OP_RENAME2;
	const struct rename2_in *in = (const void *)body_of(r);
	const char *new, *old = name_at(r, has_flags ? sizeof *in : sizeof in->newdir, &new);

	return PyObject_CallFunction(f, "KyKyI", (unsigned long long)header_of(r)->nodeid, old, (unsigned long long)in->newdir, new,
		has_flags ? in->flags : 0);
}

static PyObject *call_setxattr(PyObject *f, const struct request *r)
{
	const struct setxattr_in *in = (const void *)body_of(r);
	const char *value, *name = name_at(r, sizeof *in, &value), *end = r->mem + r->size;
	size_t there = value < end ? (size_t)(end - value) : 0;

	return PyObject_CallFunction(f, "Kyy#III", (unsigned long long)header_of(r)->nodeid, name, value,
		(Py_ssize_t)(in->size < there ? in->size : there), in->flags, header_of(r)->uid, header_of(r)->gid);
}

static PyObject *call_copy(PyObject *f, const struct request *r)
{
	const struct copy_file_range_in *in = (const void *)body_of(r);

	return PyObject_CallFunction(f, "KKKKKKI", (unsigned long long)header_of(r)->nodeid, (unsigned long long)in->off_in,
		(unsigned long long)in->nodeid_out, (unsigned long long)in->off_out, (unsigned long long)in->len, (unsigned long long)in->flags,
		header_of(r)->uid);
}

static size_t fixed_size(uint32_t opcode)
{
	switch (opcode) {
	case OP_SETATTR: return sizeof(struct setattr_in);
	case OP_MKNOD: return sizeof(struct mknod_in);
	case OP_MKDIR: return sizeof(struct mkdir_in);
	case OP_RENAME2: return sizeof(struct rename2_in);
	case OP_SETXATTR: return sizeof(struct setxattr_in);
	case OP_GETXATTR: case OP_LISTXATTR: case OP_RENAME: case OP_LINK: case OP_FORGET: return 8;
	case OP_READ: case OP_READDIRPLUS: return sizeof(struct read_in);
	case OP_WRITE: return sizeof(struct write_in);
	case OP_COPY_FILE_RANGE: case OP_COPY_FILE_RANGE_64: return sizeof(struct copy_file_range_in);
	case OP_FSYNC: case OP_FSYNCDIR: return 16;
	default: return 0;
	}
}

static PyObject *call(PyObject *f, const struct request *r)
{
	const struct in_header *h = header_of(r);
	const struct read_in *read = (const void *)body_of(r);
	uint64_t node = h->nodeid, other;
	uint32_t flags;

	switch (h->opcode) {
	case OP_LOOKUP: case OP_UNLINK: case OP_RMDIR: case OP_REMOVEXATTR: return call_with(f, number(node), name_object(r, 0), NULL);
	case OP_GETATTR: case OP_READLINK: case OP_READ: case OP_WRITE: return call_with(f, number(node), NULL, NULL);
	case OP_FORGET:
		memcpy(&other, body_of(r), sizeof other);
		return call_with(f, number(node), number(other), NULL);
	case OP_SETATTR: return call_setattr(f, r);
	case OP_MKNOD: return call_mknod(f, r);
	case OP_MKDIR: return call_mkdir(f, r);
	case OP_SYMLINK: return call_symlink(f, r);
	case OP_RENAME: case OP_RENAME2: return call_rename(f, r);
	case OP_LINK:
		memcpy(&other, body_of(r), sizeof other);
		return call_with(f, number(other), number(node), name_object(r, sizeof other));
	case OP_GETXATTR: return call_with(f, number(node), name_object(r, 8), NULL);
	case OP_LISTXATTR: return call_with(f, number(node), number(h->uid), NULL);
	case OP_SETXATTR: return call_setxattr(f, r);
	case OP_READDIRPLUS: return call_with(f, number(node), number(read->offset), number(read->size));
	case OP_COPY_FILE_RANGE: case OP_COPY_FILE_RANGE_64: return call_copy(f, r);
	case OP_FSYNC: case OP_FSYNCDIR:
		memcpy(&flags, body_of(r) + 8, sizeof flags);
		return call_with(f, number(node), number(flags & 1), NULL);
	default:
		return Py_NewRef(Py_NotImplemented);
	}
}

/* ---- from the result to the reply ---- */

static uint64_t number_in(PyObject *tuple, Py_ssize_t at)
{
	return PyLong_AsUnsignedLongLongMask(PyTuple_GetItem(tuple, at));
}

static void put_time(int64_t ns, uint64_t *seconds, uint32_t *nanoseconds)
{
	int64_t rest = ns % 1000000000;
	*seconds = (uint64_t)(ns / 1000000000 - (rest < 0));
	*nanoseconds = (uint32_t)(rest < 0 ? rest + 1000000000 : rest);
}

/* A time in ns, of an os.stat_result: an int that need not fit 64 bits, and then is shown as the last one that does. */
static int64_t time_of(PyObject *st, Py_ssize_t at)
{
	int64_t ns = PyLong_AsLongLong(PyStructSequence_GetItem(st, at));
	if (ns == -1 && PyErr_Occurred()) {
		PyErr_Clear();
		return INT64_MAX;
	}
	return ns;
}

static bool is_tuple(PyObject *object, Py_ssize_t size)
{
	if (PyTuple_Check(object) && PyTuple_Size(object) == size)
		return true;
	PyErr_SetString(PyExc_TypeError, "not what was agreed");
	return false;
}

/* What an os.stat_result says, but for what goes into it beside that. */
static bool pack_stat_result(PyObject *st, struct attr *out)
{
	if (!PyTuple_Check(st) || PyTuple_Size(st) <= ST_GID) {
		PyErr_SetString(PyExc_TypeError, "no attributes");
		return false;
	}
	*out = (struct attr){
		.size = number_in(st, ST_SIZE), .mode = (uint32_t)number_in(st, ST_MODE), .nlink = (uint32_t)number_in(st, ST_NLINK),
		.uid = (uint32_t)number_in(st, ST_UID), .gid = (uint32_t)number_in(st, ST_GID),
		.blocks = PyLong_AsUnsignedLongLongMask(PyStructSequence_GetItem(st, ST_BLOCKS)),
		.rdev = (uint32_t)PyLong_AsUnsignedLongLongMask(PyStructSequence_GetItem(st, ST_RDEV)),
		.blksize = (uint32_t)PyLong_AsUnsignedLongLongMask(PyStructSequence_GetItem(st, ST_BLKSIZE)),
	};
	put_time(time_of(st, ST_ATIME_NS), &out->atime, &out->atimensec);
	put_time(time_of(st, ST_MTIME_NS), &out->mtime, &out->mtimensec);
	put_time(time_of(st, ST_CTIME_NS), &out->ctime, &out->ctimensec);
	return !PyErr_Occurred();
}

/* (number, stat, links), and where they differ from the stat's (uid, gid, blocks). */
static bool pack_attr(PyObject *shown, struct attr *out)
{
	Py_ssize_t size = PyTuple_Check(shown) ? PyTuple_Size(shown) : 0;
	if (size != 3 && size != 6) {
		PyErr_SetString(PyExc_TypeError, "not what an object shows");
		return false;
	}
	PyObject *st = PyTuple_GetItem(shown, 1);
	const struct attr *known = reads_attributes(st);
	if (known)
		*out = *known;
	else if (!pack_stat_result(st, out))
		return false;
	attributes_shown(out, number_in(shown, 0), LANE_LINKS_AS_COUNTED);
	out->nlink = (uint32_t)number_in(shown, 2);
	if (size == 6) {
		out->uid = (uint32_t)number_in(shown, 3);
		out->gid = (uint32_t)number_in(shown, 4);
		out->blocks = number_in(shown, 5);
	}
	return !PyErr_Occurred();
}

static bool pack_entry(PyObject *shown, struct entry_out *out)
{
	*out = (struct entry_out){ .entry_valid = FOREVER, .attr_valid = FOREVER };
	if (shown == Py_None)                /* no such name, which the kernel may remember too */
		return true;
	if (!pack_attr(shown, &out->attr))
		return false;
	out->nodeid = out->attr.ino;
	return true;
}

/* Entries are (offset after it, name, shown), chosen so that they fit. */
static bool reply_entries(int device, const struct request *r, PyObject *list)
{
	size_t size = ((const struct read_in *)(const void *)body_of(r))->size, used = 0;
	Py_ssize_t count = PyList_Check(list) ? PyList_Size(list) : -1;
	char *data = count < 0 || size > LARGEST_REPLY ? NULL : malloc(size + 1);

	for (Py_ssize_t i = 0; data && i < count; i++) {
		PyObject *item = PyList_GetItem(list, i);
		char *name;
		Py_ssize_t length;
		struct entry_out entry;
		if (!is_tuple(item, 3) || PyBytes_AsStringAndSize(PyTuple_GetItem(item, 1), &name, &length) < 0
			|| !pack_entry(PyTuple_GetItem(item, 2), &entry))
			break;
		size_t whole = (NAME_AT + (size_t)length + 7) & ~(size_t)7;
		if (used + whole > size)
			break;
		struct dirent_out dirent = { entry.attr.ino, number_in(item, 0), (uint32_t)length, (entry.attr.mode & S_IFMT) >> 12 };
		memcpy(data + used, &entry, sizeof entry);
		memcpy(data + used + DIRENT_AT, &dirent, sizeof dirent);
		memcpy(data + used + NAME_AT, name, (size_t)length);
		memset(data + used + NAME_AT + length, 0, whole - NAME_AT - (size_t)length);
		used += whole;
	}
	bool is_packed = data && !PyErr_Occurred();
	if (is_packed)
		reply_to(device, header_of(r)->unique, 0, data, used);
	free(data);
	return is_packed;
}

/* The kernel asks first with size 0 for how long it is. */
static bool reply_xattr(int device, const struct request *r, PyObject *value)
{
	uint32_t room, length[2] = { 0, 0 };
	char *bytes;
	Py_ssize_t size;

	memcpy(&room, body_of(r), sizeof room);
	if (PyBytes_AsStringAndSize(value, &bytes, &size) < 0)
		return false;
	length[0] = (uint32_t)size;
	if (!room)
		reply_to(device, header_of(r)->unique, 0, length, sizeof length);
	else
		reply_to(device, header_of(r)->unique, (size_t)size > room ? ERANGE : 0, bytes, (size_t)size > room ? 0 : (size_t)size);
	return true;
}

static bool reply_attributes(int device, const struct request *r, PyObject *shown)
{
	struct attr_out out = { .valid = FOREVER };

	if (!pack_attr(shown, &out.attr))
		return false;
	reply_to(device, header_of(r)->unique, 0, &out, sizeof out);
	return true;
}

static bool reply_entry(int device, const struct request *r, PyObject *shown)
{
	struct entry_out out;

	if (!pack_entry(shown, &out))
		return false;
	reply_to(device, header_of(r)->unique, 0, &out, sizeof out);
	return true;
}

static bool reply_bytes(int device, const struct request *r, PyObject *value)
{
	char *bytes;
	Py_ssize_t size;

	if (PyBytes_AsStringAndSize(value, &bytes, &size) < 0)
		return false;
	reply_to(device, header_of(r)->unique, 0, bytes, (size_t)size);
	return true;
}

static bool reply_count(int device, const struct request *r, PyObject *value)
{
	uint64_t count = PyLong_AsUnsignedLongLongMask(value);       /* of the older opcode 32 bits and as many zeros: the same bytes */

	if (PyErr_Occurred())
		return false;
	reply_to(device, header_of(r)->unique, 0, &count, sizeof count);
	return true;
}

/* True unless the result is not what this opcode's function may return. */
static bool reply(int device, const struct request *r, PyObject *result)
{
	switch (header_of(r)->opcode) {
	case OP_FORGET:
		return true;
	case OP_LOOKUP: case OP_MKNOD: case OP_MKDIR: case OP_SYMLINK: case OP_LINK:
		return reply_entry(device, r, result);
	case OP_GETATTR: case OP_SETATTR:
		return reply_attributes(device, r, result);
	case OP_READLINK:
		return reply_bytes(device, r, result);
	case OP_GETXATTR: case OP_LISTXATTR:
		return reply_xattr(device, r, result);
	case OP_READDIRPLUS:
		return reply_entries(device, r, result);
	case OP_COPY_FILE_RANGE: case OP_COPY_FILE_RANGE_64:
		return reply_count(device, r, result);
	default:
		reply_to(device, header_of(r)->unique, 0, NULL, 0);
		return true;
	}
}

/* A bug of ours, as every error that has a meaning is a number by now. */
static void report_failure(int device, const struct request *r)
{
	PyErr_WriteUnraisable(handlers[header_of(r)->opcode]);
	if (header_of(r)->opcode != OP_FORGET)
		reply_to(device, header_of(r)->unique, EIO, NULL, 0);
}

static enum direct_outcome act_on(int device, const struct request *r, PyObject *result)
{
	uint32_t opcode = header_of(r)->opcode;
	int overflow;

	if (result == Py_NotImplemented)
		return DIRECT_NOT_AT_ONCE;
	answered++;
	if (PyLong_Check(result) && PyLong_AsLongAndOverflow(result, &overflow) < 0) {
		if (opcode != OP_FORGET)
			reply_to(device, header_of(r)->unique, (int)-PyLong_AsLong(result), NULL, 0);
		if (opcode == OP_WRITE)
			lane_failed(r->mem);
		return DIRECT_ANSWERED;
	}
	if (opcode == OP_READ || opcode == OP_WRITE || (opcode == OP_SETATTR && result == Py_None))
		return DIRECT_READY;
	if ((opcode == OP_FSYNC || opcode == OP_FSYNCDIR) && result != Py_None)
		return DIRECT_SYNC;
	if (!reply(device, r, result))
		report_failure(device, r);
	return DIRECT_ANSWERED;
}

/* Many at once, each like a FORGET of its own. */
static enum direct_outcome forget_all(const struct request *r)
{
	struct batch_forget_in in;
	struct forget_one one;

	if (!direct_has(OP_FORGET) || body_size(r) < sizeof in)
		return DIRECT_NOT_AT_ONCE;
	memcpy(&in, body_of(r), sizeof in);
	for (size_t at = sizeof in; in.count && at + sizeof one <= body_size(r); in.count--, at += sizeof one) {
		memcpy(&one, body_of(r) + at, sizeof one);
		PyObject *result = call_with(handlers[OP_FORGET], number(one.nodeid), number(one.nlookup), NULL);
		if (!result)
			PyErr_WriteUnraisable(handlers[OP_FORGET]);
		Py_XDECREF(result);
	}
	answered++;
	return DIRECT_ANSWERED;
}

enum direct_outcome direct_answer(int device, const struct request *r, int *fd)
{
	uint32_t opcode = header_of(r)->opcode;

	if (opcode == OP_BATCH_FORGET)
		return forget_all(r);
	if (!direct_has(opcode) || body_size(r) < fixed_size(opcode))
		return DIRECT_NOT_AT_ONCE;
	PyObject *result = call(handlers[opcode], r);
	if (!result) {
		report_failure(device, r);
		return DIRECT_ANSWERED;
	}
	enum direct_outcome outcome = act_on(device, r, result);
	if (outcome == DIRECT_SYNC)
		*fd = (int)PyLong_AsLong(result);
	Py_DECREF(result);
	return outcome;
}
