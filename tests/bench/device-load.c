// What a guest does to its virtio disk and network card while they are measured. Two programs in one:
//
//   device-load               the only process of a guest. It is told on its serial port what to do, a line each, and answers "DONE COUNT NS".
//   device-load host ADDRESS  the other end of the network, on the host.
//
// The guest's lines, all of MS milliseconds but the first:
//   fill              writes the whole disk once
//   read DEPTH MS     random reads of 4 KiB, DEPTH at a time; counts requests
//   write DEPTH MS    the same with writes
//   scan MS           reads of 1 MiB one after the other; counts requests
//   stream MS         a TCP stream to the host; counts pieces of 64 KiB that have arrived there
//   answer MS         a byte there and a byte back over TCP; counts answers
//
// The disk is opened past the guest's page cache and asked through Linux's aio (io_submit(2)), so that one thread keeps DEPTH requests open.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH_MAX = 64, SMALL = 4 << 10, LARGE = 1 << 20, PIECE = 64 << 10, PORT_STREAM = 7000, PORT_ANSWER = 7001 };

// In the order in which they need each other. One that the kernel has built in is not among the files.
static const char *const MODULES[] = {"virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
				      "virtio_blk", "failover", "net_failover", "virtio_net"};

static volatile sig_atomic_t late;

static void fail(const char *what)
{
	printf("FAILED: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	// The first process of a guest must not end.
	if (getpid() == 1)
		for (;;)
			pause();
	exit(1);
}

// fail_if CONDITION WHAT.
#define fail_if(condition, what) do { if (condition) fail(what); } while (0)

static long long nanoseconds(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void set_late(int signal)
{
	(void)signal;
	late = 1;
}

// A signal ends the work, so that no request asks for the time: in some guests that is an exit.
static void begin(int ms)
{
	struct itimerval limit = {.it_value = {ms / 1000, ms % 1000 * 1000}};
	struct sigaction action = {.sa_handler = set_late};
	late = 0;
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &limit, NULL);
}

// Marsaglia's xorshift64: every guest asks for the same places in the same order.
static unsigned long long next_random(void)
{
	static unsigned long long state = 88172645463325252ULL;
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

// work OPCODE DEPTH BYTES: requests until it is late, or without a limit of time (ms 0) once through the whole disk. Gives how many were done.
static long long work(int opcode, int depth, size_t bytes, int ms)
{
	static char *buffers;
	static int disk = -1;
	static unsigned long long size;
	static aio_context_t context;
	struct iocb requests[DEPTH_MAX], *list[DEPTH_MAX];
	struct io_event done[DEPTH_MAX];
	unsigned long long next = 0;
	long long count = 0;
	int ready = depth, open_requests = 0;

	if (disk < 0) {
		disk = open("/dev/vda", O_RDWR | O_DIRECT);
		fail_if(disk < 0 || ioctl(disk, BLKGETSIZE64, &size), "/dev/vda");
		fail_if(posix_memalign((void **)&buffers, LARGE, (size_t)DEPTH_MAX * LARGE / 4), "memory");
		memset(buffers, 0x5a, (size_t)DEPTH_MAX * LARGE / 4);
		fail_if(syscall(SYS_io_setup, DEPTH_MAX, &context), "io_setup");
	}
	memset(requests, 0, sizeof requests);
	for (int i = 0; i < depth; i++)
		list[i] = &requests[i];
	if (ms)
		begin(ms);
	else
		late = 0;
	for (;;) {
		for (int i = 0; i < ready; i++) {
			unsigned long long place = bytes == SMALL ? next_random() % (size / bytes) : next++ % (size / bytes);
			*list[i] = (struct iocb){
				.aio_lio_opcode = opcode, .aio_fildes = disk, .aio_buf = (__u64)(buffers + (list[i] - requests) * bytes),
				.aio_nbytes = bytes, .aio_offset = place * bytes};
		}
		for (int begun = 0; begun < ready;) {
			long taken = syscall(SYS_io_submit, context, ready - begun, list + begun);
			fail_if(taken < 0 && errno != EINTR, "io_submit");
			begun += taken < 0 ? 0 : taken;
		}
		open_requests += ready;
		for (;;) {
			ready = syscall(SYS_io_getevents, context, late ? open_requests : 1, depth, done, NULL);
			if (ready >= 0)
				break;
			fail_if(errno != EINTR, "io_getevents");
		}
		for (int i = 0; i < ready; i++) {
			errno = done[i].res < 0 ? -done[i].res : EIO;
			fail_if(done[i].res != (long long)bytes, "a request");
			list[i] = (struct iocb *)done[i].obj;
		}
		open_requests -= ready;
		count += ready;
		late |= !ms && count + open_requests >= (long long)(size / bytes);
		if (late && open_requests == 0)
			return count;
		if (late)
			ready = 0;
	}
}

static struct sockaddr_in address_of(const char *address, int port)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
	if (!address || !inet_aton(address, &to.sin_addr))
		fail("no address");
	return to;
}

static int connect_to(int port)
{
	struct sockaddr_in host = address_of(getenv("LOAD_HOST"), port);
	int stream = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
	fail_if(stream < 0 || connect(stream, (struct sockaddr *)&host, sizeof host), "connect");
	setsockopt(stream, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
	return stream;
}

static long long stream(int ms)
{
	static char piece[PIECE];
	int to = connect_to(PORT_STREAM);
	long long bytes = 0;
	begin(ms);
	while (!late) {
		ssize_t sent = send(to, piece, sizeof piece, 0);
		fail_if(sent < 0 && errno != EINTR, "send");
		bytes += sent < 0 ? 0 : sent;
	}
	shutdown(to, SHUT_WR);
	// The host answers when it has read the last byte.
	fail_if(recv(to, piece, 1, 0) != 1, "the end of the stream");
	close(to);
	return bytes / PIECE;
}

static long long answers(int ms)
{
	int to = connect_to(PORT_ANSWER);
	long long count = 0;
	char byte = 0;
	begin(ms);
	while (!late) {
		ssize_t got;
		fail_if(send(to, &byte, 1, 0) != 1, "send");
		while ((got = recv(to, &byte, 1, 0)) < 0 && errno == EINTR)
			;
		fail_if(got != 1, "recv");
		count++;
	}
	close(to);
	return count;
}

static void set_up_guest(void)
{
	struct ifreq card = {.ifr_name = "eth0"};
	struct termios raw;
	char path[64];
	int port, plug;

	mkdir("/dev", 0755);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	port = open("/dev/ttyS0", O_RDWR);
	dup2(port, 0);
	dup2(port, 1);
	dup2(port, 2);
	fail_if(tcgetattr(0, &raw), "the serial port");
	cfmakeraw(&raw);
	tcsetattr(0, TCSANOW, &raw);
	for (size_t i = 0; i < sizeof MODULES / sizeof *MODULES; i++) {
		snprintf(path, sizeof path, "/modules/%s.ko", MODULES[i]);
		int module = open(path, O_RDONLY | O_CLOEXEC);
		if (module >= 0)
			fail_if(syscall(SYS_finit_module, module, "", 0), MODULES[i]);
	}
	plug = socket(AF_INET, SOCK_DGRAM, 0);
	struct sockaddr_in own = address_of(getenv("LOAD_ADDRESS"), 0), mask = address_of("255.255.255.0", 0);
	memcpy(&card.ifr_addr, &own, sizeof own);
	fail_if(ioctl(plug, SIOCSIFADDR, &card), "the card's address");
	memcpy(&card.ifr_netmask, &mask, sizeof mask);
	fail_if(ioctl(plug, SIOCSIFNETMASK, &card), "the card's netmask");
	card.ifr_flags = IFF_UP | IFF_RUNNING;
	fail_if(ioctl(plug, SIOCSIFFLAGS, &card), "the card");
	close(plug);
}

static void serve_guest(void)
{
	char line[80];
	while (fgets(line, sizeof line, stdin)) {
		long long from = nanoseconds(), count;
		int depth, ms;
		if (!strcmp(line, "fill\n"))
			count = work(IOCB_CMD_PWRITE, 4, LARGE, 0);
		else if (sscanf(line, "read %d %d", &depth, &ms) == 2 && depth > 0 && depth <= DEPTH_MAX)
			count = work(IOCB_CMD_PREAD, depth, SMALL, ms);
		else if (sscanf(line, "write %d %d", &depth, &ms) == 2 && depth > 0 && depth <= DEPTH_MAX)
			count = work(IOCB_CMD_PWRITE, depth, SMALL, ms);
		else if (sscanf(line, "scan %d", &ms) == 1)
			count = work(IOCB_CMD_PREAD, 1, LARGE, ms);
		else if (sscanf(line, "stream %d", &ms) == 1)
			count = stream(ms);
		else if (sscanf(line, "answer %d", &ms) == 1)
			count = answers(ms);
		else
			continue;
		printf("DONE %lld %lld\n", count, nanoseconds() - from);
		fflush(stdout);
	}
	fail("the serial port ended");
}

static int listen_on(const char *address, int port)
{
	struct sockaddr_in own = address_of(address, port);
	int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	fail_if(listener < 0 || bind(listener, (struct sockaddr *)&own, sizeof own) || listen(listener, 8), "listen");
	return listener;
}

// One process for each port and connection: none waits for another.
static void serve_host(const char *address)
{
	static char buffer[256 << 10];
	int answer = fork() == 0;
	int listener = listen_on(address, answer ? PORT_ANSWER : PORT_STREAM), yes = 1;
	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		int from = accept(listener, NULL, NULL);
		if (from < 0 || fork() != 0) {
			close(from);
			continue;
		}
		setsockopt(from, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
		while (recv(from, buffer, answer ? 1 : sizeof buffer, 0) > 0)
			if (answer)
				fail_if(send(from, buffer, 1, 0) != 1, "send");
		if (!answer)
			send(from, buffer, 1, 0);
		exit(0);
	}
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "host"))
		serve_host(argv[2]);
	set_up_guest();
	printf("READY\n");
	fflush(stdout);
	serve_guest();
}
