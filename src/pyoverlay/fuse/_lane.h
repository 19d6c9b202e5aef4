/* Requests that need no decision, answered between registered descriptors; used by _wire.c alone and free of Python.
 *
 * The receiver holds the lane's lock from the look-up of a descriptor to the end of its use. Who clears a node's descriptors therefore waits
 * for a read or write that uses them, and may close them as soon as the call returns. Work that is queued for a thread owns duplicates.
 */
#ifndef PYOVERLAY_LANE_H
#define PYOVERLAY_LANE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* <linux/fuse.h>, protocol 7.31 to 7.45. */
enum opcode {
	OP_GETATTR = 3, OP_SETATTR = 4, OP_READ = 15, OP_WRITE = 16, OP_RELEASE = 18, OP_FSYNC = 20, OP_GETXATTR = 22, OP_FLUSH = 25, OP_INIT = 26,
	OP_READDIR = 28, OP_RELEASEDIR = 29, OP_FSYNCDIR = 30, OP_INTERRUPT = 36, OP_IOCTL = 39,
	OP_READDIRPLUS = 44, OPCODES = 64,
};

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

struct attr_out {
	uint64_t valid;                      /* seconds that the kernel may believe it */
	uint32_t valid_nsec, dummy;
	uint64_t ino, size, blocks, atime, mtime, ctime;
	uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags;
};

/* A request as it was read: its header and body lie at mem, size bytes; the buffer holds capacity. */
struct request {
	char *mem;
	size_t size, capacity;
};

static inline const struct in_header *header_of(const struct request *r) { return (const struct in_header *)(const void *)r->mem; }
static inline char *body_of(const struct request *r) { return r->mem + sizeof(struct in_header); }
static inline size_t body_size(const struct request *r) { return r->size - sizeof(struct in_header); }

struct lane_counts {
	uint64_t reads, writes, xattrs, isattys, attributes;     /* answered by the receiver itself */
	uint64_t queued_reads, queued_writes;
};

double monotonic_us(void);
void reply_to(int device, uint64_t unique, int error, const void *body, size_t size);

void lane_lock(void);
bool lane_try_lock(void);
void lane_unlock(void);

/* With the lock held. 0 or -ENOMEM. A descriptor of -1 is none; node 0 is no node. owns_attributes: what fstat says of write_fd, but for
 * the number, is what the node shows, and changing it there is all there is to changing it. */
int lane_set(uint64_t node, int read_fd, int write_fd, bool owns_attributes);
int lane_set_no_xattr(uint64_t node, bool absent);
bool lane_take_written(uint64_t node);       /* 0: any node */
void lane_clear(void);
size_t lane_nodes(void);
struct lane_counts lane_counts(void);

/* Takes the lock itself. True if the request is answered, or will be; r->mem is NULL if its buffer went with it. */
bool lane_answer(int device, struct request *r);

/* GETATTR and SETATTR of a node that owns its attributes, by its write_fd (_attributes.c). False: it takes a decision, and so Python. */
bool answer_getattr(int device, const struct request *r, int fd);
bool answer_setattr(int device, const struct request *r, int fd);

#endif
