/* See _latency.h. */
#include "_latency.h"

#include <stdbool.h>
#include <stdint.h>
#include <unistd.h>

enum { AT_WORK = 16 };                       /* requests in a row, so that a single look does not cost two calls and a wake-up of everybody */
static const int32_t NONE = 0, ANY = 2000000000;       /* µs; the second is PM_QOS_CPU_LATENCY_DEFAULT_VALUE of <linux/pm_qos.h> */

static int device = -1;
static bool is_asked;
static int in_a_row;

static void ask_for(bool awake)
{
	const int32_t *wanted = awake ? &NONE : &ANY;

	if (write(device, wanted, sizeof *wanted) == sizeof *wanted)
		is_asked = awake;
	else
		device = -1;                 /* not the device that it should be; closing it ends what was asked for */
}

void latency_set(int fd)
{
	device = fd;
	is_asked = false;
	in_a_row = 0;
}

void latency_busy(void)
{
	if (device >= 0 && !is_asked && ++in_a_row >= AT_WORK)
		ask_for(true);
}

void latency_idle(void)
{
	in_a_row = 0;
	if (device >= 0 && is_asked)
		ask_for(false);
}
