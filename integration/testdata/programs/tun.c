// tun holds descriptors of tun and tap devices, single and of several queues,
// and of none, and sees to it that packets go through them in both directions.
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_ether.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHECK(ok) do { if (!(ok)) die(__LINE__, #ok); } while (0)

static FILE *report;

static void die(int line, const char *what)
{
	fprintf(report, "FAIL tun.c:%d: %s: %m\n", line, what);
	fflush(report);
	exit(1);
}

static int attach(const char *name, short flags)
{
	struct ifreq req = {.ifr_flags = flags};
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	CHECK(fd >= 0);
	if (name) {
		strcpy(req.ifr_name, name);
		CHECK(ioctl(fd, TUNSETIFF, &req) == 0);
	}
	return fd;
}

static void up(const char *name, const char *address)
{
	struct ifreq req = {0};
	struct sockaddr_in *in = (struct sockaddr_in *)&req.ifr_addr;
	int s = socket(AF_INET, SOCK_DGRAM, 0);
	strcpy(req.ifr_name, name);
	in->sin_family = AF_INET;
	inet_pton(AF_INET, address, &in->sin_addr);
	CHECK(ioctl(s, SIOCSIFADDR, &req) == 0);
	inet_pton(AF_INET, "255.255.255.0", &in->sin_addr);
	CHECK(ioctl(s, SIOCSIFNETMASK, &req) == 0);
	CHECK(ioctl(s, SIOCGIFFLAGS, &req) == 0);
	req.ifr_flags |= IFF_UP;
	CHECK(ioctl(s, SIOCSIFFLAGS, &req) == 0);
	close(s);
}

// through sends a datagram out by a device and expects it on one of two
// descriptors, behind skip bytes.
static void through(int a, int b, const char *to, int skip)
{
	char packet[2048];
	struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(9)};
	inet_pton(AF_INET, to, &peer.sin_addr);
	int s = socket(AF_INET, SOCK_DGRAM, 0);
	for (;;) { // what the kernel sends of its own accord
		int n = read(a, packet, sizeof packet);
		int m = b < 0 ? -1 : read(b, packet, sizeof packet);
		if (n < 0 && m < 0)
			break;
	}
	CHECK(sendto(s, "payload", 7, 0, (struct sockaddr *)&peer, sizeof peer) == 7);
	for (int tries = 0; tries < 100; tries++) {
		struct pollfd p[2] = {{.fd = a, .events = POLLIN}, {.fd = b, .events = POLLIN}};
		CHECK(poll(p, 2, 2000) > 0);
		int n = read(p[0].revents & POLLIN ? a : b, packet, sizeof packet);
		CHECK(n > 0);
		if (n == skip + 20 + 8 + 7 && !memcmp(packet + skip + 28, "payload", 7)) {
			close(s);
			return;
		}
	}
	CHECK(!"the packet came");
}

// into writes a packet as from outside and expects a socket to get it.
static void into(int fd, const char *local, const char *from)
{
	struct { char ip[20]; char udp[8]; char data[4]; } p = {0};
	struct sockaddr_in in = {.sin_family = AF_INET};
	socklen_t n = sizeof in;
	int s = socket(AF_INET, SOCK_DGRAM, 0);
	CHECK(bind(s, (struct sockaddr *)&in, sizeof in) == 0 && getsockname(s, (struct sockaddr *)&in, &n) == 0);
	p.ip[0] = 0x45, p.ip[3] = 32, p.ip[8] = 64, p.ip[9] = 17;
	inet_pton(AF_INET, from, p.ip + 12);
	inet_pton(AF_INET, local, p.ip + 16);
	unsigned sum = 0;
	for (int i = 0; i < 20; i += 2)
		sum += (unsigned char)p.ip[i] << 8 | (unsigned char)p.ip[i + 1];
	sum = ~((sum & 0xffff) + (sum >> 16));
	p.ip[10] = sum >> 8, p.ip[11] = sum;
	p.udp[1] = 9, memcpy(p.udp + 2, &in.sin_port, 2), p.udp[5] = 12;
	memcpy(p.data, "back", 4);
	CHECK(write(fd, &p, sizeof p) == sizeof p);
	char data[8];
	struct pollfd ready = {.fd = s, .events = POLLIN};
	CHECK(poll(&ready, 1, 2000) == 1 && recv(s, data, sizeof data, 0) == 4 && !memcmp(data, "back", 4));
	close(s);
}

int main(void)
{
	report = fopen("/out/tun", "w");
	int tun = attach("one", IFF_TUN | IFF_NO_PI), many = attach("many", IFF_TAP | IFF_NO_PI | IFF_MULTI_QUEUE),
	    more = attach("many", IFF_TAP | IFF_NO_PI | IFF_MULTI_QUEUE), none = attach(NULL, 0), header = 10, size;
	int kept = attach("kept", IFF_TUN | IFF_NO_PI | IFF_VNET_HDR), sndbuf = 123456;
	CHECK(ioctl(kept, TUNSETPERSIST, 1) == 0 && ioctl(kept, TUNSETOWNER, 77) == 0 && ioctl(kept, TUNSETSNDBUF, &sndbuf) == 0);
	header = 12;
	CHECK(ioctl(kept, TUNSETVNETHDRSZ, &header) == 0);
	up("one", "10.7.1.1");
	up("many", "10.7.2.1");
	for (long round = 1;; round++) {
		through(tun, -1, "10.7.1.9", 0);
		into(tun, "10.7.1.1", "10.7.1.9");
		struct ifreq req = {0};
		CHECK(ioctl(kept, TUNGETIFF, &req) == 0 && !strcmp(req.ifr_name, "kept") && req.ifr_flags & IFF_PERSIST);
		CHECK(ioctl(kept, TUNGETVNETHDRSZ, &size) == 0 && size == 12 && ioctl(kept, TUNGETSNDBUF, &size) == 0 && size == 123456);
		CHECK(ioctl(tun, TUNGETIFF, &req) == 0 && !strcmp(req.ifr_name, "one") && !(req.ifr_flags & IFF_PERSIST));
		CHECK(ioctl(more, TUNGETIFF, &req) == 0 && !strcmp(req.ifr_name, "many") && req.ifr_flags & IFF_MULTI_QUEUE);
		CHECK(ioctl(many, TUNGETIFF, &req) == 0 && !strcmp(req.ifr_name, "many") && !(req.ifr_flags & IFF_PERSIST));
		CHECK(ioctl(none, TUNGETIFF, &req) == -1 && errno == EBADFD);
		fprintf(report, "%ld\n", round);
		fflush(report);
		usleep(10000);
	}
}
