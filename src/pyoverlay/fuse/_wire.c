/* pyoverlay.fuse._wire: completes pyfuse3 from outside, without changing it or libfuse.
 *
 * Loaded RTLD_GLOBAL before pyfuse3, this module is the first to define fuse_session_receive_buf, fuse_session_process_buf and
 * fuse_session_destroy, so pyfuse3's calls of these arrive here; libfuse's own are found among the loaded objects. Nothing of libfuse is
 * linked or included: only `struct fuse_buf`, the same in every libfuse 3, and the kernel's protocol are declared again below.
 *
 *   receive   returns the next request that is neither the lane's (_lane.c) nor answered by one plain call of Python (_direct.c); _receive.c
 *             waits for it. None to read is -EINTR, at which pyfuse3 goes back to its loop; is_idle() tells the loop whether to sleep there.
 *   process   gives Python the INIT reply to change, puts the node id where the file handle was, and turns opcodes that pyfuse3 does not
 *             know into a READ of handle 0, which no file has. pyfuse3 runs that READ like any handler, with its own tasks, its own
 *             answer and its own errors; what the handler returns becomes the body of the reply, whatever the opcode was.
 *   destroy   forgets the session, so that no descriptor number outlives it.
 *
 * pyfuse3 has one session a process and one thread that receives. The callbacks and the device are used under the GIL.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_calls.h"
#include "_direct.h"
#include "_latency.h"
#include "_notify.h"
#include "_reads.h"
#include "_receive.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define INTERPOSED __attribute__((visibility("default")))

struct fuse_session;
struct fuse_buf {                            /* libfuse 3.0; later versions append fields that only libfuse's own receive uses */
	size_t size;
	int flags;
	void *mem;
	int fd;
	off_t pos;
};

INTERPOSED int fuse_session_receive_buf(struct fuse_session *, struct fuse_buf *);
INTERPOSED void fuse_session_process_buf(struct fuse_session *, const struct fuse_buf *);
INTERPOSED void fuse_session_destroy(struct fuse_session *);

enum { BODY_SHOWN = 128, FATTR_FH = 1 << 6 };

/* What serve() was told. */
static struct {
	bool is_extra[OPCODES];
	PyObject *on_init, *on_interrupt, *on_failed_page;
} wire;

/* ---- libfuse's own functions ---- */

static struct {
	void (*process_buf)(struct fuse_session *, const struct fuse_buf *);
	void (*destroy)(struct fuse_session *);
	int (*fd)(struct fuse_session *);
	void (*exit)(struct fuse_session *);
} libfuse;

struct names {
	char **list;
	size_t count;
};

static int collect_name(struct dl_phdr_info *object, size_t size, void *result)
{
	struct names *names = result;
	char **longer = realloc(names->list, (names->count + 1) * sizeof *longer);

	(void)size;
	if (!longer)
		return 1;
	names->list = longer;
	if (object->dlpi_name && *object->dlpi_name && (longer[names->count] = strdup(object->dlpi_name)))
		names->count++;
	return 0;
}

/* dlsym gives void pointers; ISO C wants the detour to a function pointer. */
static bool load(void *object, const char *name, void *function)
{
	void *symbol = dlsym(object, name);
	memcpy(function, &symbol, sizeof symbol);
	return symbol != NULL;
}

/* fuse_session_fd exists in libfuse 3 only, so an old libfuse 2 in the process is passed over. */
static bool load_from(const char *name)
{
	void *object = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
	if (!object)
		return false;
	bool found = load(object, "fuse_session_process_buf", &libfuse.process_buf) && libfuse.process_buf != fuse_session_process_buf
		&& load(object, "fuse_session_destroy", &libfuse.destroy) && load(object, "fuse_session_fd", &libfuse.fd)
		&& load(object, "fuse_session_exit", &libfuse.exit);
	if (!found)
		libfuse.fd = NULL;
	dlclose(object);
	return found;
}

/* Names first, dlopen afterwards: inside dl_iterate_phdr it would take the loader's two locks in the wrong order. */
static bool libfuse_is_found(void)
{
	struct names names = { NULL, 0 };

	if (libfuse.fd)
		return true;
	dl_iterate_phdr(collect_name, &names);
	for (size_t i = 0; i < names.count; i++) {
		if (!libfuse.fd)
			load_from(names.list[i]);
		free(names.list[i]);
	}
	free(names.list);
	return libfuse.fd != NULL;
}

/* ---- receive ---- */

/* libfuse is not told: pyfuse3 gives it nothing to call, and it would keep the message of each request that never was, or no longer is, its
 * own, to ask for it once more. By then the request has been read, since messages are read one after the other. */
static void interrupted(const char *body, size_t size)
{
	uint64_t unique;

	if (!wire.on_interrupt || size < sizeof unique)
		return;
	memcpy(&unique, body, sizeof unique);
	PyObject *done = PyObject_CallFunction(wire.on_interrupt, "K", (unsigned long long)unique);
	if (!done)
		PyErr_WriteUnraisable(wire.on_interrupt);
	Py_XDECREF(done);
}

/* The mount is gone: nobody waits for what is under way. */
static void end(struct fuse_session *se)
{
	uint64_t all = 0;

	libfuse.exit(se);
	interrupted((const char *)&all, sizeof all);
}

/* The buffer is one for all of pyfuse3's tasks: nothing of a request is used after process_buf, which takes it back from the task. */
int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
	if (!libfuse_is_found())
		return -ENOSYS;
	ssize_t n = receive(libfuse.fd(se));
	if (n > 0)
		*buf = (struct fuse_buf){ .size = (size_t)n, .mem = received()->mem, .fd = -1 };
	else if (n == 0)
		end(se);
	return (int)n;
}

/* ---- process ---- */

static uint32_t get32(const char *at)
{
	uint32_t value;
	memcpy(&value, at, sizeof value);
	return value;
}

/* The kernel fixes the size of a WRITE in INIT; the next receive makes room for it. */
static void note_max_write(const char *reply, Py_ssize_t size)
{
	enum { MAX_WRITE_AT = sizeof(struct out_header) + 20 };
	if (size >= MAX_WRITE_AT + 4)
		receive_writes_of(get32(reply + MAX_WRITE_AT));
}

static void send_init_reply(int device, const char *reply, Py_ssize_t size)
{
	note_max_write(reply, size);
	if (write(device, reply, (size_t)size) < 0)
		PyErr_Clear();               /* refused or aborted: the kernel ends the mount, and the next read says so */
}

static void change_and_send(int device, const struct fuse_buf *buf, const char *reply, Py_ssize_t size)
{
	PyObject *changed = PyObject_CallFunction(wire.on_init, "y#y#", (char *)buf->mem, (Py_ssize_t)buf->size, reply, size);
	char *bytes;
	Py_ssize_t length;

	if (changed && PyBytes_AsStringAndSize(changed, &bytes, &length) == 0) {
		send_init_reply(device, bytes, length);
	} else {
		PyErr_WriteUnraisable(wire.on_init);
		send_init_reply(device, reply, size);
	}
	Py_XDECREF(changed);
}

/* libfuse answers INIT on the session's descriptor and nowhere else, so that number is, for the one call, a socket of ours. The device stays
 * open under another number meanwhile: no poller loses it, and this thread is the only one that answers before INIT is done. */
static bool answer_init(struct fuse_session *se, const struct fuse_buf *buf)
{
	int device = libfuse.fd(se), pair[2], kept = fcntl(device, F_DUPFD_CLOEXEC, 3), flags = fcntl(device, F_GETFD);
	char reply[4096];

	if (kept < 0)
		return false;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
		close(kept);
		return false;
	}
	bool redirected = dup3(pair[1], device, O_CLOEXEC) >= 0;
	if (redirected) {
		libfuse.process_buf(se, buf);
		while (dup2(kept, device) < 0 && (errno == EINTR || errno == EBUSY))
			;
		fcntl(device, F_SETFD, flags);
		ssize_t n = recv(pair[0], reply, sizeof reply, MSG_DONTWAIT);
		if (n > 0)
			change_and_send(device, buf, reply, n);
	}
	close(kept);
	close(pair[0]);
	close(pair[1]);
	return redirected;
}

/* Offset of the file handle in the body, or -1. */
static int handle_at(uint32_t opcode, const char *body, size_t size)
{
	switch (opcode) {
	case OP_READ: case OP_WRITE: case OP_RELEASE: case OP_FSYNC: case OP_FLUSH:
	case OP_READDIR: case OP_READDIRPLUS: case OP_RELEASEDIR: case OP_FSYNCDIR:
		return 0;
	case OP_SETATTR:
		return size >= 4 && get32(body) & FATTR_FH ? 8 : -1;
	default:
		return -1;
	}
}

/* With zero-message open there is no handle, and a handle tells pyfuse3's handlers no node; so each handle they see is the node's number. */
static void put_node_for_handle(const struct in_header *head, char *body, size_t size)
{
	int at = handle_at(head->opcode, body, size);
	if (at >= 0 && (size_t)at + 8 <= size)
		memcpy(body + at, &head->nodeid, 8);
}

static void process_as_read(struct fuse_session *se, const struct in_header *head)
{
	struct { struct in_header head; struct read_in read; } read = { *head, { 0 } };
	struct { struct fuse_buf buf; size_t appended_by_later_versions[8]; } small = { { sizeof read, 0, &read, -1, 0 }, { 0 } };

	read.head.len = sizeof read;
	read.head.opcode = OP_READ;
	read.head.extensions = 0;
	libfuse.process_buf(se, &small.buf);
}

static void process(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct in_header *head = buf->mem;
	char *body = (char *)buf->mem + sizeof *head;
	size_t size = buf->size - sizeof *head;

	if (head->opcode == OP_INIT && wire.on_init && answer_init(se, buf))
		return;
	if (head->opcode == OP_INTERRUPT) {
		interrupted(body, size);
		return;
	}
	if (head->opcode < OPCODES && wire.is_extra[head->opcode]) {
		process_as_read(se, head);
		return;
	}
	put_node_for_handle(head, body, size);
	libfuse.process_buf(se, buf);
}

void fuse_session_process_buf(struct fuse_session *se, const struct fuse_buf *buf)
{
	if (!libfuse_is_found())
		return;
	bool is_ours = buf->mem && buf->mem == received()->mem;
	if (is_ours)
		process(se, buf);
	else
		libfuse.process_buf(se, buf);
	if (is_ours)
		((struct fuse_buf *)buf)->mem = NULL;        /* pyfuse3 frees what its task's buffer points to when the task ends */
}

/* ---- destroy ---- */

void fuse_session_destroy(struct fuse_session *se)
{
	lane_tell_of_failure(NULL);
	lane_lock();
	lane_clear();
	lane_unlock();
	receive_no_more();
	Py_CLEAR(wire.on_init);
	Py_CLEAR(wire.on_interrupt);
	Py_CLEAR(wire.on_failed_page);
	direct_set(NULL);
	latency_set(-1);
	memset(&wire, 0, sizeof wire);
	if (libfuse_is_found())
		libfuse.destroy(se);
}

/* ---- what Python calls ---- */

static void lock_lane(void)
{
	if (lane_try_lock())
		return;
	Py_BEGIN_ALLOW_THREADS               /* the receiver is using a descriptor, and may need the GIL before it is done */
	lane_lock();
	Py_END_ALLOW_THREADS
}

static PyObject *none_or_memory_error(int result)
{
	if (result < 0)
		return PyErr_NoMemory();
	Py_RETURN_NONE;
}

static void page_failed(uint64_t node)
{
	PyGILState_STATE state = PyGILState_Ensure();
	PyObject *done = wire.on_failed_page ? PyObject_CallFunction(wire.on_failed_page, "K", (unsigned long long)node) : NULL;

	if (wire.on_failed_page && !done)
		PyErr_WriteUnraisable(wire.on_failed_page);
	Py_XDECREF(done);
	PyGILState_Release(state);
}

static PyObject *serve(PyObject *self, PyObject *args)
{
	PyObject *init, *interrupt, *opcodes, *direct = NULL, *failed = Py_None, *each, *item;
	bool is_extra[OPCODES] = { false };

	(void)self;
	if (!PyArg_ParseTuple(args, "OOO|O!O", &init, &interrupt, &opcodes, &PyDict_Type, &direct, &failed) || !(each = PyObject_GetIter(opcodes)))
		return NULL;
	while ((item = PyIter_Next(each))) {
		long opcode = PyLong_AsLong(item);
		Py_DECREF(item);
		if (opcode < 0 || opcode >= OPCODES) {
			if (!PyErr_Occurred())
				PyErr_Format(PyExc_ValueError, "no such opcode: %ld", opcode);
			break;
		}
		is_extra[opcode] = true;
	}
	Py_DECREF(each);
	if (PyErr_Occurred() || direct_set(direct) < 0)
		return NULL;
	PyObject *old_init = wire.on_init, *old_interrupt = wire.on_interrupt, *old_failed = wire.on_failed_page;
	wire.on_init = init == Py_None ? NULL : Py_NewRef(init);
	wire.on_interrupt = interrupt == Py_None ? NULL : Py_NewRef(interrupt);
	wire.on_failed_page = failed == Py_None ? NULL : Py_NewRef(failed);
	lane_tell_of_failure(page_failed);
	memcpy(wire.is_extra, is_extra, sizeof is_extra);
	Py_XDECREF(old_failed);
	Py_XDECREF(old_init);
	Py_XDECREF(old_interrupt);
	Py_RETURN_NONE;
}

static PyObject *current(size_t limit)
{
	const struct request *r = received();

	if (r->size < sizeof(struct in_header)) {
		PyErr_SetString(PyExc_LookupError, "no request is being handled");
		return NULL;
	}
	const struct in_header *h = header_of(r);
	size_t size = body_size(r);
	return Py_BuildValue("IKKIIIy#", h->opcode, (unsigned long long)h->unique, (unsigned long long)h->nodeid, h->uid, h->gid, h->pid,
		body_of(r), (Py_ssize_t)(size < limit ? size : limit));
}

static PyObject *request(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	return current(BODY_SHOWN);
}

static PyObject *whole_request(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	return current(SIZE_MAX);
}

static PyObject *lane(PyObject *self, PyObject *args)
{
	unsigned long long node;
	int read_fd, write_fd, links = LANE_NO_ATTRIBUTES, waits = LANE_WAITS_FOR_ANYTHING;
	unsigned server = 0;

	(void)self;
	if (!PyArg_ParseTuple(args, "Kii|iiI", &node, &read_fd, &write_fd, &links, &waits, &server))
		return NULL;
	lock_lane();
	int result = lane_set(node, read_fd, write_fd, links, waits, server);
	lane_unlock();
	return none_or_memory_error(result);
}

static PyObject *latency(PyObject *self, PyObject *args)
{
	int fd;

	(void)self;
	if (!PyArg_ParseTuple(args, "i", &fd))
		return NULL;
	latency_set(fd);
	Py_RETURN_NONE;
}

static PyObject *no_xattr(PyObject *self, PyObject *args)
{
	unsigned long long node;
	int absent, lists_nothing = 0;

	(void)self;
	if (!PyArg_ParseTuple(args, "Kp|p", &node, &absent, &lists_nothing))
		return NULL;
	lock_lane();
	int result = lane_set_no_xattr(node, absent, lists_nothing);
	lane_unlock();
	return none_or_memory_error(result);
}

static PyObject *written(PyObject *self, PyObject *args)
{
	unsigned long long node = 0;

	(void)self;
	if (!PyArg_ParseTuple(args, "|K", &node))
		return NULL;
	lock_lane();
	bool was = lane_take_written(node);
	lane_unlock();
	return PyBool_FromLong(was);
}

static PyObject *requests_by_opcode(void)
{
	PyObject *result = PyDict_New();

	for (uint32_t i = 0; result && i < OPCODES; i++) {
		if (!received_of(i))
			continue;
		PyObject *opcode = PyLong_FromUnsignedLong(i), *count = PyLong_FromUnsignedLongLong(received_of(i));
		if (!opcode || !count || PyDict_SetItem(result, opcode, count) < 0)
			Py_CLEAR(result);
		Py_XDECREF(opcode);
		Py_XDECREF(count);
	}
	return result;
}

static PyObject *counts(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	lock_lane();
	struct lane_counts c = lane_counts();
	size_t nodes = lane_nodes();
	lane_unlock();
	PyObject *requests = requests_by_opcode();
	if (!requests)
		return NULL;
	return Py_BuildValue("N{s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:n}", requests, "reads", c.reads, "writes", c.writes, "xattrs", c.xattrs,
		"isattys", c.isattys, "attributes", c.attributes, "queued_reads", c.queued_reads, "queued_writes", c.queued_writes,
		"direct", direct_answered(), "nodes", (Py_ssize_t)nodes);
}

static PyObject *is_idle(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	return PyBool_FromLong(received_nothing() || !receives());
}

static PyObject *hold(PyObject *self, PyObject *args)
{
	int change;

	(void)self;
	if (!PyArg_ParseTuple(args, "i", &change))
		return NULL;
	receive_beside(change);
	Py_RETURN_NONE;
}

static PyObject *is_active(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	return PyBool_FromLong(receives());
}

/* The main program's scope holds what was loaded RTLD_GLOBAL, in order; pyfuse3, loaded later, looks there first. */
static PyObject *is_interposed(PyObject *self, PyObject *unused)
{
	void (*first)(struct fuse_session *, const struct fuse_buf *) = NULL;
	void *program = dlopen(NULL, RTLD_LAZY);

	(void)self, (void)unused;
	if (program) {
		load(program, "fuse_session_process_buf", &first);
		dlclose(program);
	}
	return PyBool_FromLong(first == fuse_session_process_buf);
}

static PyObject *finds_libfuse(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	return PyBool_FromLong(libfuse_is_found());
}

#define FAST(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef methods[] = {          /* documented in _wire.pyi */
	{ "serve", serve, METH_VARARGS, NULL },
	{ "request", request, METH_NOARGS, NULL },
	{ "whole_request", whole_request, METH_NOARGS, NULL },
	{ "lane", lane, METH_VARARGS, NULL },
	{ "no_xattr", no_xattr, METH_VARARGS, NULL },
	{ "latency", latency, METH_VARARGS, NULL },
	{ "written", written, METH_VARARGS, NULL },
	{ "counts", counts, METH_NOARGS, NULL },
	{ "is_idle", is_idle, METH_NOARGS, NULL },
	{ "hold", hold, METH_VARARGS, NULL },
	{ "is_active", is_active, METH_NOARGS, NULL },
	{ "is_interposed", is_interposed, METH_NOARGS, NULL },
	{ "finds_libfuse", finds_libfuse, METH_NOARGS, NULL },
	{ "lstat", FAST(reads_lstat), METH_FASTCALL, NULL },
	{ "lstat_all", FAST(reads_lstat_all), METH_FASTCALL, NULL },
	{ "fstat", reads_fstat, METH_O, NULL },
	{ "readlink", FAST(reads_readlink), METH_FASTCALL, NULL },
	{ "open_regular", FAST(reads_open_regular), METH_FASTCALL, NULL },
	{ "getxattr", FAST(reads_getxattr), METH_FASTCALL, NULL },
	{ "find_xattr", FAST(reads_find_xattr), METH_FASTCALL, NULL },
	{ "find_xattr_of", FAST(reads_find_xattr_of), METH_FASTCALL, NULL },
	{ "listxattr", FAST(reads_listxattr), METH_FASTCALL, NULL },
	{ "scan", FAST(reads_scan), METH_FASTCALL, NULL },
	{ "notify_inval_inode", notify_inval_inode, METH_VARARGS, NULL },
	{ "notify_inval_entry", notify_inval_entry, METH_VARARGS, NULL },
	{ "notify_prune", notify_prune, METH_O, NULL },
	{ "watch_calls", watch_calls, METH_O, NULL },
	{ "copy_up_file", copy_up_file, METH_VARARGS, NULL },
	{ "make", make_for_caller, METH_VARARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef module = { PyModuleDef_HEAD_INIT, "_wire", NULL, -1, methods, NULL, NULL, NULL, NULL };

PyMODINIT_FUNC PyInit__wire(void)
{
	return reads_prepare() < 0 ? NULL : PyModule_Create(&module);
}
