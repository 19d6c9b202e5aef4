/* The kernel's protocol, as far as the extension reads and writes it: <linux/fuse.h>, 7.31 to 7.45. */
#ifndef PYOVERLAY_PROTOCOL_H
#define PYOVERLAY_PROTOCOL_H

#include <stdint.h>

enum opcode {
	OP_LOOKUP = 1, OP_FORGET = 2, OP_GETATTR = 3, OP_SETATTR = 4, OP_READLINK = 5, OP_SYMLINK = 6, OP_MKNOD = 8, OP_MKDIR = 9, OP_UNLINK = 10,
	OP_RMDIR = 11, OP_RENAME = 12, OP_LINK = 13, OP_READ = 15, OP_WRITE = 16, OP_RELEASE = 18, OP_FSYNC = 20, OP_SETXATTR = 21, OP_GETXATTR = 22,
	OP_LISTXATTR = 23, OP_REMOVEXATTR = 24, OP_FLUSH = 25, OP_INIT = 26, OP_READDIR = 28, OP_RELEASEDIR = 29, OP_FSYNCDIR = 30,
	OP_INTERRUPT = 36, OP_IOCTL = 39, OP_BATCH_FORGET = 42, OP_READDIRPLUS = 44, OP_RENAME2 = 45, OP_COPY_FILE_RANGE = 47,
	OP_COPY_FILE_RANGE_64 = 53, OPCODES = 64,
};

enum { FOREVER = 1000000000 };               /* seconds that an answer holds: this mount is the only writer */

struct in_header {
	uint32_t len, opcode;
	uint64_t unique, nodeid;
	uint32_t uid, gid, pid, extensions;
};

struct out_header {
	uint32_t len;
	int32_t error;
	uint64_t unique;
};

struct read_in {
	uint64_t fh, offset;
	uint32_t size, read_flags;
	uint64_t lock_owner;
	uint32_t flags, padding;
};

struct write_in {
	uint64_t fh, offset;
	uint32_t size, write_flags;
	uint64_t lock_owner;
	uint32_t flags, padding;
};

struct setattr_in {
	uint32_t valid, padding;
	uint64_t fh, size, lock_owner, atime, mtime, ctime;
	uint32_t atimensec, mtimensec, ctimensec, mode, unused4, uid, gid, unused5;
};

struct mknod_in {
	uint32_t mode, rdev, umask, padding;
};

struct mkdir_in {
	uint32_t mode, umask;
};

struct rename2_in {                          /* RENAME has newdir alone */
	uint64_t newdir;
	uint32_t flags, padding;
};

struct setxattr_in {
	uint32_t size, flags;
};

struct copy_file_range_in {
	uint64_t fh_in, off_in, nodeid_out, fh_out, off_out, len, flags;
};

struct batch_forget_in {
	uint32_t count, dummy;
};

struct forget_one {
	uint64_t nodeid, nlookup;
};

struct attr {
	uint64_t ino, size, blocks, atime, mtime, ctime;
	uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags;
};

struct attr_out {
	uint64_t valid;                      /* seconds that the kernel may believe it */
	uint32_t valid_nsec, dummy;
	struct attr attr;
};

struct entry_out {
	uint64_t nodeid, generation, entry_valid, attr_valid;
	uint32_t entry_valid_nsec, attr_valid_nsec;
	struct attr attr;
};

struct dirent_out {                          /* behind an entry_out; the name follows, padded to 8 bytes */
	uint64_t ino, offset;
	uint32_t length, type;
};

#endif
