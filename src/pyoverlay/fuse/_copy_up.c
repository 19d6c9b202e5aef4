/* The copy-up of a small file: one call, where Python's steps in core/copyup.py are about twenty. What it does, and in which order, is
 * theirs; tests hold the two to the same list of calls.
 *
 * First everything is read that the copy will be made of, and whatever is unusual ends it there: nothing has been changed yet, and Python
 * does it instead. Then the copy is made in the work directory and gets its name by one rename.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_calls.h"
#include "_reads.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { XATTRS_ROOM = 8192, NAMES_ROOM = 2048, HANDLE_ROOM = 128, NAME_ROOM = 256 };
enum order { AS_IT_COMES, WRITTEN_OUT, WITH_SIZE, WITH_ALL };        /* core/calls.py, Order */

struct job {                                 /* PlainFile of core/calls.py */
	int given_fd, from_fd, work_fd, to_fd;
	const char *name, *temporary, *to_name, *mark_prefix, *uuid;
	Py_ssize_t uuid_length;
	long long size, most, uid, gid;
	int in_memory, may_share, order, is_nosuid, obeys_modes;

	/* What was found out. */
	int source_fd, copy_fd, times_error;
	bool refuses_to_clone;
	struct stat source, parent, copy;
	size_t length;
	char *data;
	char xattrs[XATTRS_ROOM];            /* each: its name, a NUL, a uint32_t of its value's size, the value */
	size_t xattrs_size;
	unsigned char origin[5 + 16 + HANDLE_ROOM];
	size_t origin_size;
};

enum outcome { FAILED = -1, DECLINED, DONE };

/* ---- what the copy is made of ---- */

static int open_source(const struct job *j)
{
	if (j->given_fd >= 0)
		return j->given_fd;
	int fd = may_call("openat") ? open_regular(j->from_fd, j->name, O_RDONLY | O_NOATIME) : -1;
	if (fd < 0 && errno == EPERM)        /* O_NOATIME is for the owner and for CAP_FOWNER */
		fd = open_regular(j->from_fd, j->name, O_RDONLY);
	return fd;
}

/* Blocks that do not cover the size may be compressed ones. */
static bool has_holes(const struct job *j)
{
	return j->source.st_blocks * 512 < j->source.st_size && lseek(j->source_fd, 0, SEEK_HOLE) < j->source.st_size;
}

/* All of it, if that needs no waiting for a disk. */
static enum outcome read_data(struct job *j)
{
	size_t got = 0;

	if (!(j->data = malloc(j->length + 1))) {
		errno = ENOMEM;
		return FAILED;
	}
	while (got < j->length) {
		struct iovec rest = { j->data + got, j->length - got };
		ssize_t n = may_call("preadv2") ? preadv2(j->source_fd, &rest, 1, (off_t)got, j->in_memory ? 0 : RWF_NOWAIT) : -1;
		if (n < 0 && (errno == EAGAIN || errno == EOPNOTSUPP))
			return DECLINED;
		if (n < 0)
			return FAILED;
		if (n == 0)                  /* the lower got shorter under us */
			return DECLINED;
		got += (size_t)n;
	}
	return DONE;
}

static bool starts_with(const char *name, const char *prefix) { return strncmp(name, prefix, strlen(prefix)) == 0; }

/* Marks say how the lower is put together, and are no part of the file; a caller's own attribute of such a name is kept one level deeper. */
static bool is_mark(const struct job *j, const char *name)
{
	return starts_with(name, j->mark_prefix) && !starts_with(name + strlen(j->mark_prefix), "overlay.");
}

static bool is_capability(const char *name) { return strcmp(name, "security.capability") == 0; }

static enum outcome read_xattr(struct job *j, const char *name)
{
	size_t name_size = strlen(name) + 1, at = j->xattrs_size + name_size + sizeof(uint32_t);

	if (at >= XATTRS_ROOM)
		return DECLINED;
	ssize_t size = may_call("fgetxattr") ? fgetxattr(j->source_fd, name, j->xattrs + at, XATTRS_ROOM - at) : -1;
	if (size < 0)
		return errno == ENODATA || errno == EOPNOTSUPP ? DONE : errno == ERANGE ? DECLINED : FAILED;
	uint32_t value_size = (uint32_t)size;
	memcpy(j->xattrs + j->xattrs_size, name, name_size);
	memcpy(j->xattrs + at - sizeof value_size, &value_size, sizeof value_size);
	j->xattrs_size = at + (size_t)size;
	return DONE;
}

static enum outcome read_xattrs(struct job *j)
{
	char names[NAMES_ROOM + 1];
	ssize_t size = may_call("flistxattr") ? flistxattr(j->source_fd, names, NAMES_ROOM) : -1;

	if (size < 0)
		return errno == EOPNOTSUPP ? DONE : errno == ERANGE ? DECLINED : FAILED;
	names[size] = '\0';                  /* a list whose server left out the last one ends here */
	for (const char *name = names; name < names + size; name += strlen(name) + 1) {
		if (is_mark(j, name)) {
			if (strcmp(name + strlen(j->mark_prefix), "metacopy") == 0)
				return DECLINED;
			continue;
		}
		if (j->is_nosuid && is_capability(name))
			continue;
		enum outcome outcome = read_xattr(j, name);
		if (outcome != DONE)
			return outcome;
	}
	return DONE;
}

/* struct ovl_fb, as marks.encode_origin() writes it; none where the file system has no handles. */
static bool read_origin(struct job *j)
{
	union { struct file_handle head; char room[sizeof(struct file_handle) + HANDLE_ROOM]; } handle = { .head.handle_bytes = HANDLE_ROOM };
	int mount_id;

	if (!may_call("name_to_handle_at") || name_to_handle_at(j->source_fd, "", &handle.head, &mount_id, AT_EMPTY_PATH) < 0)
		return errno == EOPNOTSUPP || errno == EOVERFLOW;
	size_t length = 5 + 16 + handle.head.handle_bytes;
	bool is_big_endian = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__;
	unsigned char head[5] = { 0, 0xfb, (unsigned char)length, is_big_endian, (unsigned char)handle.head.handle_type };
	memcpy(j->origin, head, sizeof head);
	memcpy(j->origin + 5, j->uuid, 16);
	memcpy(j->origin + 5 + 16, handle.head.f_handle, handle.head.handle_bytes);
	j->origin_size = length;
	return true;
}

static bool stat_of(int fd, struct stat *st) { return may_call("fstat") && fstat(fd, st) == 0; }

static enum outcome look(struct job *j)
{
	if ((j->source_fd = open_source(j)) < 0 || !stat_of(j->source_fd, &j->source) || !stat_of(j->to_fd, &j->parent))
		return FAILED;
	if (!S_ISREG(j->source.st_mode)) {
		errno = ESTALE;
		return FAILED;
	}
	j->length = (size_t)(j->size >= 0 && j->size < j->source.st_size ? j->size : j->source.st_size);
	if ((long long)j->length > j->most || has_holes(j) || (j->obeys_modes && (j->parent.st_mode & 0300) != 0300))
		return DECLINED;
	enum outcome outcome = read_data(j);
	if (outcome == DONE)
		outcome = read_xattrs(j);
	return outcome == DONE && !read_origin(j) ? FAILED : outcome;
}

/* ---- making it ---- */

static bool is_truncation(const struct job *j) { return (off_t)j->length < j->source.st_size; }

static bool copy_data(struct job *j)
{
	if (j->may_share && j->length && !is_truncation(j)) {
		if (may_call("ficlone") && ioctl(j->copy_fd, FICLONE, j->source_fd) == 0)
			return true;
		j->refuses_to_clone = errno == EOPNOTSUPP || errno == EXDEV || errno == ENOTTY;
		if (!j->refuses_to_clone && errno != EINVAL && errno != EPERM && errno != ETXTBSY)
			return false;
	}
	for (size_t at = 0; at < j->length;) {
		ssize_t n = may_call("pwrite") ? pwrite(j->copy_fd, j->data + at, j->length - at, (off_t)at) : -1;
		if (n < 0)
			return false;
		at += (size_t)n;
	}
	return true;
}

/* The disk then works while the attributes are set, which is a tenth of the time that it takes. */
static bool start_writeback(const struct job *j)
{
	if (j->order == AS_IT_COMES || !j->length)
		return true;
	return may_call("start_writeback") && sync_file_range(j->copy_fd, 0, 0, SYNC_FILE_RANGE_WRITE) == 0;
}

/* The data before the name: an empty file after a power cut is what the rename would otherwise leave. */
static bool put_on_disk(const struct job *j)
{
	const unsigned written_out = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;

	switch (j->order) {
	case WRITTEN_OUT:
		return may_call("sync_file_range") && sync_file_range(j->copy_fd, 0, 0, written_out) == 0;
	case WITH_SIZE:
		return may_call("fdatasync") && fdatasync(j->copy_fd) == 0;
	case WITH_ALL:
		return may_call("fsync") && fsync(j->copy_fd) == 0;
	default:
		return true;
	}
}

static bool set_owner(const struct job *j)
{
	uid_t uid = j->uid < 0 ? j->source.st_uid : (uid_t)j->uid;
	gid_t gid = j->gid < 0 ? j->source.st_gid : (gid_t)j->gid;

	if (uid == j->copy.st_uid && gid == j->copy.st_gid)
		return true;
	return may_call("chown") && fchown(j->copy_fd, uid, gid) == 0;
}

/* What the upper cannot hold is left out only if nobody's rights depend on it (ovl_copy_xattr). */
static bool set_xattrs(const struct job *j)
{
	for (size_t at = 0; at < j->xattrs_size;) {
		const char *name = j->xattrs + at, *value = name + strlen(name) + 1 + sizeof(uint32_t);
		uint32_t size;
		memcpy(&size, value - sizeof size, sizeof size);
		if (!may_call("setxattr") || fsetxattr(j->copy_fd, name, value, size, 0) < 0) {
			if ((errno != EOPNOTSUPP && errno != EPERM) || starts_with(name, "system.") || is_capability(name))
				return false;
		}
		at = (size_t)(value + size - j->xattrs);
	}
	return true;
}

/* Not worth failing for: without it an inode number changes at the next mount (ovl_set_origin). */
static bool set_origin(const struct job *j)
{
	char name[NAME_ROOM];

	if (!j->origin_size)
		return true;
	snprintf(name, sizeof name, "%sorigin", j->mark_prefix);
	if (may_call("setxattr") && fsetxattr(j->copy_fd, name, j->origin, j->origin_size, 0) == 0)
		return true;
	return errno == EOPNOTSUPP || errno == EPERM || errno == ENOSPC;
}

static bool set_mode_and_times(const struct job *j)
{
	mode_t mode = j->source.st_mode & 07777 & (j->is_nosuid ? ~(mode_t)(S_ISUID | S_ISGID) : 07777);
	struct timespec times[2] = { j->source.st_atim, j->source.st_mtim };

	if (is_truncation(j))
		times[1].tv_nsec = UTIME_OMIT;
	if ((mode != (j->copy.st_mode & 07777) || j->xattrs_size) && (!may_call("chmod") || fchmod(j->copy_fd, mode) < 0))
		return false;
	return may_call("utimens") && futimens(j->copy_fd, times) == 0;
}

/* The directory keeps its times, if it can: it does not change because something in it was copied up. */
static bool give_name(struct job *j)
{
	struct timespec times[2] = { j->parent.st_atim, j->parent.st_mtim };

	if (!may_call("rename") || renameat(j->work_fd, j->temporary, j->to_fd, j->to_name) < 0)
		return false;
	if (!may_call("utimens") || utimensat(j->to_fd, ".", times, 0) < 0)
		j->times_error = errno;
	return true;
}

static bool make(struct job *j)
{
	/* The work directory is nobody else's, so the mode may be the file's from the start; its owner must be able to set attributes. */
	mode_t mode = (j->source.st_mode & 0777) | 0600;

	j->copy_fd = may_call("open") ? openat(j->work_fd, j->temporary, O_CREAT | O_EXCL | O_RDWR | O_NOFOLLOW | O_CLOEXEC, mode) : -1;
	return j->copy_fd >= 0 && stat_of(j->copy_fd, &j->copy) && copy_data(j) && start_writeback(j) && set_owner(j)
		&& set_xattrs(j) && set_origin(j) && set_mode_and_times(j) && put_on_disk(j) && give_name(j);
}

/* Of what failed the name in the work directory is left, for Python to remove. */
static enum outcome run(struct job *j)
{
	enum outcome outcome = look(j);

	if (outcome == DONE && !make(j))
		outcome = FAILED;
	int error = errno;
	free(j->data);
	if (j->source_fd >= 0 && j->source_fd != j->given_fd)
		close(j->source_fd);
	if (outcome != DONE && j->copy_fd >= 0)
		close(j->copy_fd);
	errno = error;
	return outcome;
}

PyObject *copy_up_file(PyObject *self, PyObject *args)
{
	struct job j = { .source_fd = -1, .copy_fd = -1 };
	enum outcome outcome;

	(void)self;
	if (!PyArg_ParseTuple(args, "iiyiyiyLLppiLLppyy#", &j.given_fd, &j.from_fd, &j.name, &j.work_fd, &j.temporary, &j.to_fd, &j.to_name, &j.size,
			&j.most, &j.in_memory, &j.may_share, &j.order, &j.uid, &j.gid, &j.is_nosuid, &j.obeys_modes, &j.mark_prefix, &j.uuid,
			&j.uuid_length))
		return NULL;
	if (j.uuid_length != 16 || strlen(j.mark_prefix) > NAME_ROOM / 2) {
		PyErr_SetString(PyExc_ValueError, "not the uuid, or the prefix, of marks");
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS               /* it may wait for a disk */
	outcome = run(&j);
	Py_END_ALLOW_THREADS
	if (outcome == FAILED)
		return PyErr_SetFromErrno(PyExc_OSError);
	if (outcome == DECLINED)
		Py_RETURN_NONE;
	return Py_BuildValue("iKOOi", j.copy_fd, (unsigned long long)j.copy.st_ino, is_truncation(&j) ? Py_True : Py_False,
		j.refuses_to_clone ? Py_True : Py_False, j.times_error);
}
