/* GETATTR and SETATTR of files whose descriptor tells all: fstat, fchown, fchmod, futimens.
 *
 * A file being unpacked or copied is asked for its attributes and given an owner, a mode and times: four requests, each of which would cost
 * more in Python than the system call that answers it. What changes the size, or takes suid and sgid away, is left to Python.
 */
#define _GNU_SOURCE
#include "_lane.h"

#include <errno.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum {                                       /* FATTR_* of <linux/fuse.h> */
	SET_MODE = 1 << 0, SET_UID = 1 << 1, SET_GID = 1 << 2, SET_ATIME = 1 << 4, SET_MTIME = 1 << 5, HAS_FH = 1 << 6,
	ATIME_NOW = 1 << 7, MTIME_NOW = 1 << 8, HAS_LOCKOWNER = 1 << 9, SET_CTIME = 1 << 10, KILL_SUIDGID = 1 << 11,
	KNOWN = SET_MODE | SET_UID | SET_GID | SET_ATIME | SET_MTIME | HAS_FH | ATIME_NOW | MTIME_NOW | HAS_LOCKOWNER | SET_CTIME,
};

/* The kernel's encoding of a device number in a message, new_encode_dev(). */
static uint32_t encoded(dev_t device)
{
	uint32_t high = major(device), low = minor(device);
	return (low & 0xff) | (high << 8) | ((low & ~0xffu) << 12);
}

void attributes_of(const struct stat *st, struct attr *out)
{
	*out = (struct attr){
		.ino = st->st_ino, .size = (uint64_t)st->st_size, .blocks = (uint64_t)st->st_blocks,
		.atime = (uint64_t)st->st_atim.tv_sec, .mtime = (uint64_t)st->st_mtim.tv_sec, .ctime = (uint64_t)st->st_ctim.tv_sec,
		.atimensec = (uint32_t)st->st_atim.tv_nsec, .mtimensec = (uint32_t)st->st_mtim.tv_nsec, .ctimensec = (uint32_t)st->st_ctim.tv_nsec,
		.mode = st->st_mode, .nlink = (uint32_t)st->st_nlink, .uid = st->st_uid, .gid = st->st_gid, .rdev = encoded(st->st_rdev),
		.blksize = (uint32_t)st->st_blksize,
	};
}

void attributes_shown(struct attr *attr, uint64_t node, int64_t links)
{
	attr->ino = node;
	if (links != LANE_LINKS_AS_COUNTED)
		attr->nlink = (uint32_t)links;
	/* Delayed allocation: with 0 blocks `tar -S` would take a file with data for one hole. */
	if (attr->size && !attr->blocks && S_ISREG(attr->mode))
		attr->blocks = 1;
}

static bool reply_attributes(int device, const struct request *r, int fd, int links)
{
	struct stat st;

	if (fstat(fd, &st) < 0)
		return false;
	struct attr_out out = { .valid = FOREVER };
	attributes_of(&st, &out.attr);
	attributes_shown(&out.attr, header_of(r)->nodeid, links);
	reply_to(device, header_of(r)->unique, 0, &out, sizeof out);
	return true;
}

bool answer_getattr(int device, const struct request *r, int fd, int links)
{
	return reply_attributes(device, r, fd, links);
}

static struct timespec wanted_time(uint32_t valid, uint32_t set, uint32_t now, uint64_t seconds, uint32_t nanoseconds)
{
	if (valid & now)
		return (struct timespec){ 0, UTIME_NOW };
	if (valid & set)
		return (struct timespec){ (time_t)seconds, nanoseconds };
	return (struct timespec){ 0, UTIME_OMIT };
}

/* In the order in which none undoes another: chown clears suid. 0 or an errno. */
static int change(int fd, const struct setattr_in *in)
{
	uint32_t valid = in->valid;

	if (valid & (SET_UID | SET_GID) && fchown(fd, valid & SET_UID ? in->uid : (uid_t)-1, valid & SET_GID ? in->gid : (gid_t)-1) < 0)
		return errno;
	if (valid & SET_MODE && fchmod(fd, in->mode & 07777) < 0)
		return errno;
	if (valid & (SET_ATIME | SET_MTIME | ATIME_NOW | MTIME_NOW)) {
		struct timespec times[2] = {
			wanted_time(valid, SET_ATIME, ATIME_NOW, in->atime, in->atimensec),
			wanted_time(valid, SET_MTIME, MTIME_NOW, in->mtime, in->mtimensec),
		};
		if (futimens(fd, times) < 0)
			return errno;
	}
	return 0;
}

/* One that takes suid, sgid and capabilities away is what chown(2) is, whoever calls it. */
static bool is_chown(const struct setattr_in *in)
{
	return in->valid & (SET_UID | SET_GID) && !(in->valid & SET_MODE);
}

bool answer_setattr(int device, const struct request *r, int fd, int links)
{
	const struct setattr_in *in = (const void *)body_of(r);

	if (body_size(r) < sizeof *in || in->valid & ~(uint32_t)(is_chown(in) ? KNOWN | KILL_SUIDGID : KNOWN))
		return false;
	int error = change(fd, in);
	if (!error)
		return reply_attributes(device, r, fd, links);
	reply_to(device, header_of(r)->unique, error, NULL, 0);
	return true;
}
