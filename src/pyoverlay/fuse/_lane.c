/* The lane: READ, WRITE, GETATTR, SETATTR and hopeless GETXATTR, answered without Python. See _lane.h for the lock.
 *
 * Every other request waits behind the receiver's thread. So a READ is first tried with RWF_NOWAIT. What is not in the page cache a few
 * threads read; but waking one costs about as much as a fast disk takes, so that the receiver waits for a disk itself where nobody else
 * asks for anything, until that was slow once. A WRITE only waits where the kernel throttles the writer: it is made at once until one was
 * slow, and then by the threads for a while. What a server has to be asked for is not even tried, since it may never answer, and is left to
 * threads that ask no other.
 */
#define _GNU_SOURCE
#include "_lane.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
	NO_XATTR = 1, WRITTEN = 2, IN_MEMORY = 4, NO_NOWAIT = 8, LISTS_NOTHING = 16, ON_DISK = 32, /* struct node, flags */
	PAGE = 4096,                         /* or a multiple of it */
	DATA_AT = PAGE,                      /* where data is read to in the request's own buffer: past any READ request, on a page */
	WRITE_CACHE = 1, WRITE_KILL_SUIDGID = 4,       /* FUSE_WRITE_* of <linux/fuse.h> */
	FSYNC_DATA_ONLY = 1,
	THREADS = 4,                         /* of a queue */
	QUEUED_BYTES = 64 << 20,             /* of writes; past it the receiver writes itself, and so everybody is slowed down */
};
static const double SLOW_WRITE = 5e3, SLOW_READ = 2e3, PRESSURE = 1e6;        /* microseconds */

struct node {
	uint64_t id;                         /* 0: an empty slot */
	int read_fd, write_fd;
	int links;
	unsigned flags, server;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct node *table;                   /* open addressing, linear probing, never more than half full */
static size_t slots, used;
static bool any_written;
static struct lane_counts counts;
static double pressure_until, slow_reads_until;

struct job {
	struct job *next;
	int device, fd;                      /* duplicates: neither Python nor an unmount can close them under a thread */
	uint32_t opcode, size;               /* size: bytes; of an FSYNC, whether the data alone is wanted */
	uint64_t unique, offset;
	char *mem;                           /* of a WRITE: the whole request */
};

struct queue {                               /* and the threads that serve it, which never end */
	struct queue *next;
	unsigned server;
	pthread_cond_t filled;
	struct job *head, **tail;
	int jobs, threads, idle_threads;
};

static pthread_mutex_t queue_lock = PTHREAD_MUTEX_INITIALIZER;
static struct queue disks = { .filled = PTHREAD_COND_INITIALIZER, .tail = &disks.head };
static size_t queued_bytes;

double monotonic_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

/* A reply is written whole or not at all. ENOENT: the request was aborted; ENODEV: the mount is gone. Anything else would leave the caller
 * waiting for ever, so it gets EIO, which carries no body that could be refused. */
void reply_to(int device, uint64_t unique, int error, const void *body, size_t size)
{
	struct out_header head = { (uint32_t)(sizeof head + size), -error, unique };
	struct iovec iov[2] = { { &head, sizeof head }, { (void *)body, size } };

	if (writev(device, iov, size ? 2 : 1) >= 0 || errno == ENOENT || errno == ENODEV)
		return;
	head = (struct out_header){ sizeof head, -EIO, unique };
	if (write(device, &head, sizeof head) < 0)
		return;                      /* the kernel takes no reply at all: its own end of the connection decides */
}

void lane_lock(void) { pthread_mutex_lock(&lock); }
bool lane_try_lock(void) { return pthread_mutex_trylock(&lock) == 0; }
void lane_unlock(void) { pthread_mutex_unlock(&lock); }

/* ---- the table of nodes ---- */

static size_t slot_of(uint64_t id)
{
	return (size_t)((id * 0x9E3779B97F4A7C15u) >> 32) & (slots - 1);       /* Fibonacci hashing: inode numbers come in runs */
}

static struct node *find(uint64_t id)
{
	if (!slots)
		return NULL;
	size_t i = slot_of(id);
	while (table[i].id && table[i].id != id)
		i = (i + 1) & (slots - 1);
	return &table[i];
}

static struct node *known(uint64_t id)
{
	struct node *n = id ? find(id) : NULL;
	return n && n->id ? n : NULL;
}

static bool resize(size_t new_slots)
{
	struct node *old = table, *fresh = calloc(new_slots, sizeof *fresh);
	size_t old_slots = slots;

	if (!fresh)
		return false;
	table = fresh;
	slots = new_slots;
	for (size_t i = 0; i < old_slots; i++)
		if (old[i].id)
			*find(old[i].id) = old[i];
	free(old);
	return true;
}

static struct node *known_or_new(uint64_t id)
{
	struct node *n = known(id);
	if (n || !id)
		return n;
	if (used * 2 >= slots && !resize(slots ? slots * 2 : 64))
		return NULL;
	n = find(id);
	*n = (struct node){ id, -1, -1, LANE_NO_ATTRIBUTES, 0, 0 };
	used++;
	return n;
}

/* Closes the gap by moving back each follower that its own slot allows, so that no tombstones pile up over days of look-ups and forgets. */
static void delete(struct node *n)
{
	size_t gap = (size_t)(n - table), i = gap;

	for (;;) {
		i = (i + 1) & (slots - 1);
		if (!table[i].id)
			break;
		size_t home = slot_of(table[i].id);
		if (((i - home) & (slots - 1)) >= ((i - gap) & (slots - 1))) {
			table[gap] = table[i];
			gap = i;
		}
	}
	table[gap].id = 0;
	used--;
	if (slots > 64 && used * 8 < slots)
		resize(slots / 4);           /* a failure leaves it large, which is harmless */
}

static void delete_if_empty(struct node *n)
{
	if (n->read_fd < 0 && n->write_fd < 0 && !(n->flags & NO_XATTR))
		delete(n);
}

int lane_set(uint64_t node, int read_fd, int write_fd, int links, int waits, unsigned server)
{
	struct node *n = read_fd < 0 && write_fd < 0 ? known(node) : known_or_new(node);
	if (!n)
		return read_fd < 0 && write_fd < 0 ? 0 : -ENOMEM;
	n->read_fd = read_fd;
	n->write_fd = write_fd;
	n->links = read_fd < 0 ? LANE_NO_ATTRIBUTES : links;
	n->flags &= ~(unsigned)(IN_MEMORY | ON_DISK | NO_NOWAIT);      /* of the file that the old descriptor was of */
	if (waits == LANE_WAITS_FOR_NOTHING)
		n->flags |= IN_MEMORY | NO_NOWAIT;
	else if (waits == LANE_WAITS_FOR_DISK)
		n->flags |= ON_DISK;
	if (server)
		n->flags |= NO_NOWAIT;
	n->server = server;
	delete_if_empty(n);
	return 0;
}

int lane_set_no_xattr(uint64_t node, bool absent, bool lists_nothing)
{
	struct node *n = absent ? known_or_new(node) : known(node);
	if (!n)
		return absent ? -ENOMEM : 0;
	n->flags &= ~(unsigned)(NO_XATTR | LISTS_NOTHING);
	if (absent)
		n->flags |= NO_XATTR | (lists_nothing ? LISTS_NOTHING : 0);
	else
		delete_if_empty(n);
	return 0;
}

bool lane_take_written(uint64_t node)
{
	struct node *n = known(node);
	bool was = node ? n && n->flags & WRITTEN : any_written;

	if (n)
		n->flags &= ~(unsigned)WRITTEN;
	else if (!node)
		any_written = false;
	return was;
}

void lane_clear(void)
{
	free(table);
	table = NULL;
	slots = used = 0;
	any_written = false;
	counts = (struct lane_counts){ 0 };
	pressure_until = slow_reads_until = 0;
}

size_t lane_nodes(void) { return used; }
struct lane_counts lane_counts(void) { return counts; }

/* ---- what a page held and could not be written ---- */

static void (*_Atomic tell_of_failure)(uint64_t node);

void lane_tell_of_failure(void (*tell)(uint64_t node)) { tell_of_failure = tell; }

/* Of a whole WRITE in a request's buffer. One by write(2) needs nothing: the kernel drops the page itself. */
void lane_failed(const char *mem)
{
	const struct in_header *head = (const void *)mem;
	const struct write_in *in = (const void *)(head + 1);
	void (*tell)(uint64_t node) = tell_of_failure;

	if (tell && in->write_flags & WRITE_CACHE)
		tell(head->nodeid);
}

/* ---- data ---- */

/* The bytes read, up to the end of the file, or -errno. The kernel takes a short answer for that end, while a read may also be short of a page
 * that cannot be read, or with RWF_NOWAIT of one that is not cached: so go on until nothing comes, or until a page is not whole. */
static ssize_t read_all(int fd, char *data, size_t size, off_t offset, int flags)
{
	size_t done = 0;

	while (done < size) {
		struct iovec rest = { data + done, size - done };
		ssize_t got = preadv2(fd, &rest, 1, offset + (off_t)done, flags);
		if (got < 0)
			return -errno;
		done += (size_t)got;
		if (got == 0 || (offset + (off_t)done) % PAGE)
			break;
	}
	return (ssize_t)done;
}

/* The bytes written, or -errno. Who called write(2) is told how many they were. Of pages the kernel takes no count: all, or an error. */
static ssize_t write_data(int fd, const struct write_in *in)
{
	const char *data = (const void *)(in + 1);
	size_t done = 0;

	for (;;) {
		ssize_t put = pwrite(fd, data + done, in->size - done, (off_t)(in->offset + done));
		if (put < 0)
			return -errno;
		done += (size_t)put;
		if (done == in->size || put == 0 || !(in->write_flags & WRITE_CACHE))
			return (ssize_t)done;
	}
}

static void reply_written(int device, uint64_t unique, ssize_t put)
{
	uint32_t written[2] = { put < 0 ? 0 : (uint32_t)put, 0 };
	reply_to(device, unique, put < 0 ? (int)-put : 0, written, put < 0 ? 0 : sizeof written);
}

/* ---- the threads ---- */

static void finish(struct job *j)
{
	ssize_t n;

	if (j->opcode == OP_FSYNC) {
		n = j->size ? fdatasync(j->fd) : fsync(j->fd);
		reply_to(j->device, j->unique, n < 0 ? errno : 0, NULL, 0);
	} else if (j->opcode == OP_READ) {
		char *data = malloc(j->size ? j->size : 1);
		n = data ? read_all(j->fd, data, j->size, (off_t)j->offset, 0) : -ENOMEM;
		reply_to(j->device, j->unique, n < 0 ? (int)-n : 0, data, n < 0 ? 0 : (size_t)n);
		free(data);
	} else {
		n = write_data(j->fd, (const void *)(j->mem + sizeof(struct in_header)));
		reply_written(j->device, j->unique, n);
		if (n < 0)
			lane_failed(j->mem);
		pthread_mutex_lock(&queue_lock);
		queued_bytes -= j->size;
		pthread_mutex_unlock(&queue_lock);
	}
	close(j->fd);
	close(j->device);
	free(j->mem);
	free(j);
}

static void *serve_queue(void *of)
{
	struct queue *q = of;

	for (;;) {
		pthread_mutex_lock(&queue_lock);
		q->idle_threads++;
		while (!q->head)
			pthread_cond_wait(&q->filled, &queue_lock);
		q->idle_threads--;
		struct job *j = q->head;
		q->head = j->next;
		q->jobs--;
		if (!q->head)
			q->tail = &q->head;
		pthread_mutex_unlock(&queue_lock);
		finish(j);
	}
	return NULL;
}

/* With queue_lock held. Signals are Python's: its main thread must be the one that wakes. */
static bool start_thread(struct queue *q)
{
	pthread_attr_t small;
	pthread_t thread;
	sigset_t all, before;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 128 << 10);
	pthread_attr_setdetachstate(&small, PTHREAD_CREATE_DETACHED);
	bool started = pthread_create(&thread, &small, serve_queue, q) == 0;
	pthread_attr_destroy(&small);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	q->threads += started;
	return started;
}

/* With queue_lock held. A server's queue is made when it is first used; NULL: no memory for it. */
static struct queue *queue_of(unsigned server)
{
	struct queue *q = &disks;

	while (q->server != server && q->next)
		q = q->next;
	if (q->server == server)
		return q;
	struct queue *fresh = calloc(1, sizeof *fresh);
	if (!fresh)
		return NULL;
	fresh->server = server;
	fresh->tail = &fresh->head;
	pthread_cond_init(&fresh->filled, NULL);
	return q->next = fresh;
}

/* A queue that takes one job more, with a thread to do it; NULL: no memory or thread is to be had, or too much is queued. What it says holds
 * until the next job is given, since the receiver alone gives any. */
static struct queue *ready_queue(unsigned server, size_t bytes)
{
	pthread_mutex_lock(&queue_lock);
	struct queue *q = queue_of(server);
	if (q && ((bytes && queued_bytes + bytes > QUEUED_BYTES)
			|| !(q->idle_threads > q->jobs || q->threads == THREADS || start_thread(q) || q->threads)))
		q = NULL;
	pthread_mutex_unlock(&queue_lock);
	return q;
}

static void give(struct queue *q, struct job *j)
{
	pthread_mutex_lock(&queue_lock);
	*q->tail = j;
	q->tail = &j->next;
	q->jobs++;
	queued_bytes += j->mem ? j->size : 0;
	pthread_cond_signal(&q->filled);
	pthread_mutex_unlock(&queue_lock);
}

/* A job with a device of its own; NULL: no memory or descriptor is to be had. */
static struct job *new_job(int device, const struct request *r)
{
	struct job *j = malloc(sizeof *j);

	if (!j)
		return NULL;
	*j = (struct job){ .device = fcntl(device, F_DUPFD_CLOEXEC, 3), .fd = -1, .opcode = header_of(r)->opcode, .unique = header_of(r)->unique };
	if (j->device >= 0)
		return j;
	free(j);
	return NULL;
}

/* False: no memory, descriptor or thread is to be had, and nothing was queued. A WRITE's buffer goes with the job, and another takes its
 * place. The descriptor is duplicated last: to close it could mean to wait for the server. */
static bool enqueue(int device, int fd, unsigned server, struct request *r, uint64_t offset, uint32_t size)
{
	bool is_write = header_of(r)->opcode == OP_WRITE;
	struct queue *q = ready_queue(server, is_write ? size : 0);
	struct job *j = q ? new_job(device, r) : NULL;
	char *next = is_write && j ? new_buffer(r->capacity) : NULL;

	if (j && (next || !is_write))
		j->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (!j || j->fd < 0) {
		free(next);
		if (j)
			close(j->device);
		free(j);
		return false;
	}
	j->size = size;
	j->offset = offset;
	if (is_write) {
		j->mem = r->mem;
		r->mem = next;
	}
	give(q, j);
	return true;
}

void lane_sync(int device, const struct request *r, int fd)
{
	uint32_t flags;
	struct queue *q = ready_queue(0, 0);
	struct job *j = q ? new_job(device, r) : NULL;

	memcpy(&flags, body_of(r) + sizeof(uint64_t), sizeof flags);
	flags &= FSYNC_DATA_ONLY;
	if (j) {
		j->opcode = OP_FSYNC;        /* of a directory too */
		j->fd = fd;
		j->size = flags;
		give(q, j);
		return;
	}
	int result = flags ? fdatasync(fd) : fsync(fd);
	reply_to(device, header_of(r)->unique, result < 0 ? errno : 0, NULL, 0);
	close(fd);
}

/* ---- the requests ---- */

/* As read_all; -EAGAIN if that needs a disk. */
static ssize_t read_cached(struct node *n, char *data, size_t size, off_t offset)
{
	if (!(n->flags & NO_NOWAIT)) {
		ssize_t got = read_all(n->read_fd, data, size, offset, RWF_NOWAIT);
		if (got != -EOPNOTSUPP && got != -ENOSYS)
			return got;
		n->flags |= NO_NOWAIT;
	}
	return n->flags & IN_MEMORY ? read_all(n->read_fd, data, size, offset, 0) : -EAGAIN;
}

static bool is_nobody_waiting(int device)
{
	struct pollfd one = { device, POLLIN, 0 };
	return poll(&one, 1, 0) == 0;
}

/* As read_cached, of what is not cached; -EAGAIN: a thread should do it. */
static ssize_t read_uncached(int device, const struct node *n, char *data, size_t size, off_t offset)
{
	double begin = monotonic_us();

	if (!(n->flags & ON_DISK) || begin < slow_reads_until || !is_nobody_waiting(device))
		return -EAGAIN;
	ssize_t got = read_all(n->read_fd, data, size, offset, 0);
	double end = monotonic_us();
	if (end - begin > SLOW_READ)
		slow_reads_until = end + PRESSURE;
	return got;
}

static bool answer_read(int device, struct request *r, struct node *n)
{
	const struct read_in *in = (const void *)body_of(r);

	if (n->read_fd < 0 || body_size(r) < sizeof *in || in->size > r->capacity - DATA_AT)
		return false;
	char *data = r->mem + DATA_AT;
	ssize_t got = read_cached(n, data, in->size, (off_t)in->offset);
	if (got == -EAGAIN)
		got = read_uncached(device, n, data, in->size, (off_t)in->offset);
	if (got == -EBADF)
		return false;                /* Python has another way to the file, or the right error */
	if (got == -EAGAIN) {
		if (!enqueue(device, n->read_fd, n->server, r, in->offset, in->size))
			return false;
		counts.queued_reads++;
		return true;
	}
	counts.reads++;
	reply_to(device, header_of(r)->unique, got < 0 ? (int)-got : 0, data, got < 0 ? 0 : (size_t)got);
	return true;
}

/* A caller without CAP_FSETID takes suid and sgid away by writing, and we, who may have it, would not. Which of the two goes is a decision,
 * and so Python's; nearly every file has neither. File capabilities go with any write, whoever makes it. */
static bool must_strip(int fd, const struct write_in *in)
{
	struct stat st;
	return in->write_flags & WRITE_KILL_SUIDGID && (fstat(fd, &st) < 0 || st.st_mode & (S_ISUID | S_ISGID));
}

static bool answer_write(int device, struct request *r, struct node *n)
{
	const struct write_in *in = (const void *)body_of(r);

	if (n->write_fd < 0 || body_size(r) < sizeof *in || body_size(r) - sizeof *in != in->size || must_strip(n->write_fd, in))
		return false;
	double begin = monotonic_us();
	if (begin < pressure_until && enqueue(device, n->write_fd, 0, r, in->offset, in->size)) {
		counts.queued_writes++;
	} else {
		ssize_t put = write_data(n->write_fd, in);
		if (put == -EBADF)
			return false;
		reply_written(device, header_of(r)->unique, put);
		double end = monotonic_us();
		if (put < 0)
			lane_failed(r->mem);
		if (end - begin > SLOW_WRITE)
			pressure_until = end + PRESSURE;
		counts.writes++;
	}
	n->flags |= WRITTEN;
	any_written = true;
	return true;
}

static bool answer_getxattr(int device, const struct request *r, const struct node *n)
{
	static const char *const absent[] = { "security.capability", "system.posix_acl_access", "system.posix_acl_default" };
	const size_t fixed = 8;              /* size, padding; then the name and its NUL */

	if (!(n->flags & NO_XATTR) || body_size(r) <= fixed || r->mem[r->size - 1] != '\0')
		return false;
	for (size_t i = 0; i < sizeof absent / sizeof *absent; i++) {
		if (strcmp(body_of(r) + fixed, absent[i]) == 0) {
			counts.xattrs++;
			reply_to(device, header_of(r)->unique, ENODATA, NULL, 0);
			return true;
		}
	}
	return false;
}

static bool answer_listxattr(int device, const struct request *r, const struct node *n)
{
	uint32_t size, nothing[2] = { 0, 0 };

	if (!(n->flags & LISTS_NOTHING) || body_size(r) < sizeof nothing)
		return false;
	memcpy(&size, body_of(r), sizeof size);
	counts.xattrs++;
	reply_to(device, header_of(r)->unique, 0, nothing, size ? 0 : sizeof nothing);
	return true;
}

/* isatty(3): Python and others ask it of every file they open, and no node of ours is a terminal. */
static bool answer_isatty(int device, const struct request *r)
{
	enum { CMD_AT = 12, TCGETS = 0x5401 };
	uint32_t cmd;

	if (body_size(r) < CMD_AT + sizeof cmd)
		return false;
	memcpy(&cmd, body_of(r) + CMD_AT, sizeof cmd);
	if (cmd != TCGETS)
		return false;
	counts.isattys++;
	reply_to(device, header_of(r)->unique, ENOTTY, NULL, 0);
	return true;
}

static bool answer(int device, struct request *r, struct node *n)
{
	bool answered;

	switch (header_of(r)->opcode) {
	case OP_READ:
		return answer_read(device, r, n);
	case OP_WRITE:
		return answer_write(device, r, n);
	case OP_GETXATTR:
		return answer_getxattr(device, r, n);
	case OP_LISTXATTR:
		return answer_listxattr(device, r, n);
	default:
		if (n->links == LANE_NO_ATTRIBUTES)
			return false;
		if (header_of(r)->opcode == OP_GETATTR)
			answered = answer_getattr(device, r, n->read_fd, n->links);
		else
			answered = n->write_fd >= 0 && answer_setattr(device, r, n->write_fd, n->links);
		counts.attributes += answered;
		return answered;
	}
}

bool lane_answer(int device, struct request *r)
{
	uint32_t opcode = header_of(r)->opcode;
	bool answered = false;

	if (opcode == OP_IOCTL)
		return answer_isatty(device, r);
	if (opcode != OP_READ && opcode != OP_WRITE && opcode != OP_GETXATTR && opcode != OP_LISTXATTR && opcode != OP_GETATTR
		&& opcode != OP_SETATTR)
		return false;
	lane_lock();
	struct node *n = known(header_of(r)->nodeid);
	if (n)
		answered = answer(device, r, n);
	lane_unlock();
	return answered;
}
