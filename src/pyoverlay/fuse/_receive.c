/* Receiving. See _receive.h. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_direct.h"
#include "_latency.h"
#include "_receive.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum {
	FIRST_CAPACITY = 128 << 10,          /* until INIT says how long a WRITE can be; the kernel refuses to fill less than 8 KiB */
	MOST_CAPACITY = 64 << 20,
	SLACK = 8192,                        /* headers, and the page the lane leaves free before its data */
	LINGER = 2,                          /* milliseconds */
};
/* Microseconds. SPIN is longer than a client needs from one reply to its next request; TURN is how long the loop's other tasks may be kept
 * waiting, and HELD_TURN where one of them is known to wait for a thread; requests less than BUSY apart are a client at work. Who is
 * preempted more often than once in PREEMPTED does not spin for the time CROWDED: the processor is wanted, maybe by the very client. */
static const double SPIN = 60, TURN = 4000, HELD_TURN = 1000, BUSY = 4 * 60, PREEMPTED = 20e3, CROWDED = 100e3;

static struct {
	int device;
	struct request now;
	size_t wanted_capacity;
	bool idle, active;
	int held;                            /* what the loop waits for besides the device, and would be late for */
	double spin, last_request, crowded_until, counted_at;
	long preemptions;
	uint64_t requests[OPCODES];
	PyThreadState *without_gil;          /* the receiver's, while it has released the GIL */
} receiver = { .device = -1, .wanted_capacity = FIRST_CAPACITY };

static bool prepare(int device)
{
	if (receiver.device != device) {
		cpu_set_t cpus;
		bool alone = sched_getaffinity(0, sizeof cpus, &cpus) == 0 && CPU_COUNT(&cpus) == 1;
		receiver.device = device;
		receiver.spin = alone ? 0 : SPIN;        /* on the only processor, spinning keeps the client from running */
		fcntl(device, F_SETFL, fcntl(device, F_GETFL) | O_NONBLOCK);         /* so that read() is the poll as well */
	}
	if (!receiver.now.mem || receiver.now.capacity < receiver.wanted_capacity) {
		free(receiver.now.mem);
		receiver.now = (struct request){ new_buffer(receiver.wanted_capacity), 0, receiver.wanted_capacity };
	}
	receiver.active = true;
	return receiver.now.mem != NULL;
}

static void pause_briefly(void)
{
	for (volatile int i = 0; i < 64; i++)
		;
}

/* A wait in vain: clients that come rarely are not worth the whole of it, and BUSY ones restore it. */
static void shorten(double *spin, double time)
{
	struct rusage usage;

	if (*spin <= 1)
		return;
	*spin /= 2;
	if (time - receiver.counted_at < CROWDED / 2 || getrusage(RUSAGE_THREAD, &usage) < 0)
		return;                      /* one alone, in a moment, is no sign */
	if ((double)(usage.ru_nivcsw - receiver.preemptions) * PREEMPTED > time - receiver.counted_at) {
		receiver.crowded_until = time + CROWDED;
		*spin = 1;
	}
	receiver.preemptions = usage.ru_nivcsw;
	receiver.counted_at = time;
}

/* Sleeps until there is a request, for a while: a client that pauses does not cost a trip through trio's loop, which is ten times as long
 * as this call. */
static bool comes_soon(int device)
{
	struct pollfd one = { device, POLLIN, 0 };
	return !receiver.held && poll(&one, 1, LINGER) > 0;
}

/* The size of the next request, 0 when the mount is gone, -EINTR when none came while it was worth waiting, else another -errno. */
static ssize_t next_request(int device, double *spin)
{
	double begin = monotonic_us(), time = begin;

	for (;;) {
		ssize_t n = read(device, receiver.now.mem, receiver.now.capacity);
		time = monotonic_us();
		if (n >= (ssize_t)sizeof(struct in_header)) {
			if (time - receiver.last_request < BUSY && *spin > 0 && time >= receiver.crowded_until)
				*spin = SPIN;
			receiver.last_request = time;
			latency_busy();
			return n;
		}
		if (n == 0 || (n < 0 && errno == ENODEV))
			return 0;
		if (n > 0 || errno == ENOENT)        /* not a request at all, or one that was taken back while it was read */
			continue;
		if (errno != EAGAIN)
			return -errno;
		if (time - begin >= *spin) {
			shorten(spin, time);
			if (comes_soon(device)) {
				begin = monotonic_us();
				continue;
			}
			latency_idle();
			receiver.idle = true;
			return -EINTR;
		}
		pause_briefly();
	}
}

/* True if the request is answered, or will be. */
static bool answer(int device)
{
	int fd = -1;

	if (lane_answer(device, &receiver.now))
		return true;
	uint32_t opcode = header_of(&receiver.now)->opcode;
	if (!direct_has(opcode) && opcode != OP_BATCH_FORGET)
		return false;
	PyEval_RestoreThread(receiver.without_gil);
	enum direct_outcome outcome = direct_answer(device, &receiver.now, &fd);
	receiver.without_gil = PyEval_SaveThread();
	if (outcome == DIRECT_SYNC)
		lane_sync(device, &receiver.now, fd);
	return outcome == DIRECT_READY ? lane_answer(device, &receiver.now) : outcome != DIRECT_NOT_AT_ONCE;
}

/* Without the GIL, but for what direct_answer() calls. */
static ssize_t receive_until_pyfuse3_is_asked(int device)
{
	double begin = monotonic_us();

	for (;;) {
		ssize_t n = next_request(device, &receiver.spin);
		if (n <= 0)
			return n;
		receiver.now.size = (size_t)n;
		memset(receiver.now.mem + n, 0, ZEROED);
		if (header_of(&receiver.now)->len != n) {
			reply_to(device, header_of(&receiver.now)->unique, EIO, NULL, 0);
			continue;
		}
		uint32_t opcode = header_of(&receiver.now)->opcode;
		receiver.requests[opcode < OPCODES ? opcode : 0]++;
		if (!answer(device))
			return n;
		receiver.now.size = 0;
		if (receiver.last_request - begin > (receiver.held ? HELD_TURN : TURN))
			return -EINTR;
	}
}

ssize_t receive(int device)
{
	if (!prepare(device))
		return -ENOMEM;
	receiver.idle = false;
	receiver.now.size = 0;
	receiver.without_gil = PyEval_SaveThread();
	ssize_t n = receive_until_pyfuse3_is_asked(device);
	PyEval_RestoreThread(receiver.without_gil);
	return n;
}

const struct request *received(void) { return &receiver.now; }

void receive_writes_of(size_t most)
{
	if (most + SLACK > receiver.wanted_capacity && most + SLACK <= MOST_CAPACITY)
		receiver.wanted_capacity = most + SLACK;
}

void receive_no_more(void)
{
	free(receiver.now.mem);
	memset(&receiver, 0, sizeof receiver);
	receiver.device = -1;
	receiver.wanted_capacity = FIRST_CAPACITY;
}

int receiving_device(void) { return receiver.device; }
bool receives(void) { return receiver.active; }
bool received_nothing(void) { return receiver.idle; }
uint64_t received_of(uint32_t opcode) { return receiver.requests[opcode]; }
void receive_beside(int change) { receiver.held += change; }
