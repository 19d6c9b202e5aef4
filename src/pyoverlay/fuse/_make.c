/* What is made for a caller: one call, where core/calls.py makes up to fourteen.
 *
 * Who owns a new object is decided by the ids of the thread that makes it, and its mode by the umask of the process, so these are the
 * caller's for the one system call in between. Ids that the kernel will not give us it passes over in silence: so they are asked for.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_calls.h"
#include "_reads.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

struct wanted {
	int dirfd;
	const char *name, *target;
	unsigned mode, uid, gid, umask;
	unsigned long rdev;
};

struct made {
	int fd;                              /* -1: nothing that is open */
	bool is_known;                       /* whether what follows is its attributes */
	struct stat st;
};

struct self {
	bool is_other;                       /* than the caller */
	int uid, gid, dumpable;
	mode_t umask;
};

static void be_again(const struct self *self)
{
	int error = errno;

	if (self->is_other) {
		setfsuid((uid_t)self->uid);
		setfsgid((gid_t)self->gid);
		prctl(PR_SET_DUMPABLE, self->dumpable == 1, 0, 0, 0);        /* commit_creds() made it what fs.suid_dumpable says */
	}
	umask(self->umask);
	errno = error;
}

/* False, and nothing has changed: it is nobody that we can be. */
static bool become(const struct wanted *w, struct self *self)
{
	self->umask = umask(w->umask);
	self->is_other = w->uid != geteuid() || w->gid != getegid();
	if (!self->is_other)
		return true;
	self->dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
	self->gid = setfsgid(w->gid);
	self->uid = setfsuid(w->uid);
	if ((unsigned)setfsuid((uid_t)-1) == w->uid && (unsigned)setfsgid((gid_t)-1) == w->gid)
		return true;
	be_again(self);
	errno = EINVAL;
	return false;
}

static bool make_one(const struct wanted *w, struct made *made)
{
	switch (w->mode & S_IFMT) {
	case S_IFREG:
		if (!may_call("open"))
			return false;
		do
			made->fd = openat(w->dirfd, w->name, O_CREAT | O_EXCL | O_RDWR | O_NOFOLLOW | O_CLOEXEC, w->mode & 07777);
		while (made->fd < 0 && errno == EINTR);
		return made->fd >= 0;
	case S_IFDIR:
		return may_call("mkdir") && mkdirat(w->dirfd, w->name, w->mode & 07777) == 0;
	case S_IFLNK:
		return may_call("symlink") && symlinkat(w->target, w->dirfd, w->name) == 0;
	default:
		return may_call("mknod") && mknodat(w->dirfd, w->name, w->mode, (dev_t)w->rdev) == 0;
	}
}

static bool make_as_caller(const struct wanted *w, struct made *made)
{
	struct self self;

	if (!become(w, &self))
		return false;
	bool is_made = make_one(w, made);
	be_again(&self);
	if (is_made)                         /* what cannot be looked at is for Python to find out, and to take back */
		made->is_known = (made->fd >= 0 ? fstat(made->fd, &made->st) : fstatat(w->dirfd, w->name, &made->st, AT_SYMLINK_NOFOLLOW)) == 0;
	return is_made;
}

PyObject *make_for_caller(PyObject *self, PyObject *args)
{
	struct wanted w;
	struct made made = { .fd = -1, .is_known = false };
	bool is_made;

	(void)self;
	if (!PyArg_ParseTuple(args, "iyI(III)ky", &w.dirfd, &w.name, &w.mode, &w.uid, &w.gid, &w.umask, &w.rdev, &w.target))
		return NULL;
	Py_BEGIN_ALLOW_THREADS               /* it may wait for a disk */
	is_made = make_as_caller(&w, &made);
	Py_END_ALLOW_THREADS
	if (!is_made)
		return PyErr_SetFromErrno(PyExc_OSError);
	return Py_BuildValue("iN", made.fd, made.is_known ? reads_stat(&made.st) : Py_NewRef(Py_None));
}
