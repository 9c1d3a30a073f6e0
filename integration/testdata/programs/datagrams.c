// datagrams holds sockets of UDP, UDP-Lite, ICMP, raw, packet and netlink
// sockets, with datagrams that wait, memberships, options and peers, and sees to
// it that they stay what they are.
#include <arpa/inet.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <netinet/icmp6.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <unistd.h>

#define CHECK(ok) do { if (!(ok)) die(__LINE__, #ok); } while (0)
#define UDPLITE 136
#define ICMP_FILTER 1
#ifndef SO_TXREHASH
#define SO_TXREHASH 74
#endif

static FILE *report;

static void die(int line, const char *what)
{
	fprintf(report, "FAIL datagrams.c:%d: %s: %m\n", line, what);
	fflush(report);
	exit(1);
}

typedef union { struct sockaddr a; struct sockaddr_in in; struct sockaddr_in6 in6; struct sockaddr_ll ll; struct sockaddr_nl nl; struct sockaddr_storage all; } address;

static address ip(const char *text, int port)
{
	address a = {0};
	if (inet_pton(AF_INET, text, &a.in.sin_addr) == 1) {
		a.in.sin_family = AF_INET, a.in.sin_port = htons(port);
	} else {
		CHECK(inet_pton(AF_INET6, text, &a.in6.sin6_addr) == 1);
		a.in6.sin6_family = AF_INET6, a.in6.sin6_port = htons(port);
	}
	return a;
}

static socklen_t size(const address *a)
{
	return a->a.sa_family == AF_INET ? sizeof a->in : a->a.sa_family == AF_INET6 ? sizeof a->in6 : a->a.sa_family == AF_PACKET ? sizeof a->ll : sizeof a->nl;
}

static int open_at(int type, int protocol, address a)
{
	int s = socket(a.a.sa_family, type | SOCK_NONBLOCK, protocol);
	CHECK(s >= 0);
	CHECK(bind(s, &a.a, size(&a)) == 0);
	return s;
}

static void set(int s, int level, int name, int value) { CHECK(setsockopt(s, level, name, &value, sizeof value) == 0); }

static int value(int s, int level, int name)
{
	int v = 0;
	socklen_t n = sizeof v;
	CHECK(getsockopt(s, level, name, &v, &n) == 0);
	return v;
}

// A queue is a socket at which datagrams of several senders always wait.
static struct queue { int s, senders[3]; address to, from[3]; int pktinfo; } queues[8];
static int nqueues;
static const char *texts[] = {"first", "", "third and longer"};

static void fill(struct queue *q)
{
	for (int i = 0; i < 3; i++)
		CHECK(sendto(q->senders[i], texts[i], strlen(texts[i]), 0, &q->to.a, size(&q->to)) == (ssize_t)strlen(texts[i]));
}

static void drain(struct queue *q)
{
	for (int i = 0; i < 3; i++) {
		char data[64], control[256];
		address from;
		struct iovec v = {data, sizeof data};
		struct msghdr m = {.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &v, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
		ssize_t n = recvmsg(q->s, &m, 0);
		CHECK(n == (ssize_t)strlen(texts[i]) && !memcmp(data, texts[i], n));
		CHECK(m.msg_namelen == size(&q->from[i]) && from.a.sa_family == q->from[i].a.sa_family);
		if (from.a.sa_family == AF_INET)
			CHECK(!memcmp(&from.in, &q->from[i].in, 8));
		else
			CHECK(from.in6.sin6_port == q->from[i].in6.sin6_port && !memcmp(&from.in6.sin6_addr, &q->from[i].in6.sin6_addr, 16));
		int told = 0;
		for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
			if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO) {
				struct in_pktinfo *p = (struct in_pktinfo *)CMSG_DATA(c);
				{ CHECK(p->ipi_addr.s_addr == q->to.in.sin_addr.s_addr && p->ipi_ifindex == (int)if_nametoindex("lo")); told++; }
			}
			if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TTL)
				{ CHECK(*(int *)CMSG_DATA(c) == 33); told++; }
			if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TOS)
				{ CHECK(*(unsigned char *)CMSG_DATA(c) == 0x10); told++; }
		}
		CHECK(told == q->pktinfo);
	}
	char more;
	CHECK(recv(q->s, &more, 1, 0) == -1 && errno == EAGAIN);
}

static struct queue *queue(int protocol, const char *bound, const char *to, int port, const char *sources[3])
{
	struct queue *q = &queues[nqueues++];
	q->s = open_at(SOCK_DGRAM, protocol, ip(bound, port));
	q->to = ip(to, port);
	for (int i = 0; i < 3; i++) {
		q->from[i] = ip(sources[i], 20000 + 10 * nqueues + i);
		q->senders[i] = open_at(SOCK_DGRAM, protocol, q->from[i]);
	}
	return q;
}

static int in_group(int s, const char *group, int mode, int sources)
{
	struct { uint32_t device; uint32_t pad; struct sockaddr_storage group; uint32_t mode, n; struct sockaddr_storage list[4]; } f = {.device = if_nametoindex("lo")};
	address a = ip(group, 0);
	socklen_t n = sizeof f;
	memcpy(&f.group, &a, size(&a));
	f.n = 4;
	if (getsockopt(s, a.a.sa_family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6, MCAST_MSFILTER, &f, &n) < 0)
		return 0;
	CHECK((int)f.mode == mode && (int)f.n == sources);
	return 1;
}

static void join(int s, const char *group, const char *source, int option)
{
	struct group_source_req r = {.gsr_interface = if_nametoindex("lo")};
	address a = ip(group, 0), b = ip(source ? source : group, 0);
	memcpy(&r.gsr_group, &a, size(&a));
	memcpy(&r.gsr_source, &b, size(&b));
	CHECK(setsockopt(s, a.a.sa_family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6, option, &r, option == MCAST_JOIN_GROUP ? sizeof(struct group_req) : sizeof r) == 0);
}

static void multicast(int s, const char *group, int port, int expected)
{
	address to = ip(group, port), from = ip("127.0.0.1", 0);
	int sender = open_at(SOCK_DGRAM, 0, from);
	struct in_addr lo = {.s_addr = htonl(INADDR_LOOPBACK)};
	char c;
	CHECK(setsockopt(sender, IPPROTO_IP, IP_MULTICAST_IF, &lo, sizeof lo) == 0);
	CHECK(sendto(sender, "m", 1, 0, &to.a, size(&to)) == 1);
	CHECK((recv(s, &c, 1, 0) == 1) == expected);
	close(sender);
}

static void ping(int s)
{
	struct icmphdr h = {.type = ICMP_ECHO, .un.echo.sequence = htons(7)}, back;
	address to = ip("127.0.0.1", 0);
	CHECK(sendto(s, &h, sizeof h, 0, &to.a, size(&to)) == sizeof h);
	struct pollfd p = {.fd = s, .events = POLLIN};
	CHECK(poll(&p, 1, 2000) == 1 && recv(s, &back, sizeof back, 0) == sizeof back);
	CHECK(back.type == ICMP_ECHOREPLY && back.un.echo.sequence == htons(7));
}

// A netlink socket at which a refusal of the kernel's always waits. Of its loss it
// must tell, once.
static void ask_nonsense(int s)
{
	struct nlmsghdr h = {sizeof h, 0xffff, NLM_F_REQUEST | NLM_F_ACK, 7, 0};
	CHECK(send(s, &h, sizeof h, 0) == sizeof h);
}

static void hear_refusal(int s)
{
	char data[256];
	ssize_t n = recv(s, data, sizeof data, 0);
	CHECK(n > 0 ? ((struct nlmsghdr *)data)->nlmsg_type == NLMSG_ERROR && ((struct nlmsghdr *)data)->nlmsg_seq == 7 : errno == ENOBUFS);
	CHECK(recv(s, data, sizeof data, 0) == -1 && errno == EAGAIN);
}

static int same(int s, int level, int name, const void *want, socklen_t size)
{
	char now[64];
	socklen_t n = sizeof now;
	return getsockopt(s, level, name, now, &n) == 0 && n == size && !memcmp(now, want, size);
}

int main(int argc, char **argv)
{
	(void)argc;
	report = fopen("/out/datagrams", "w");
	address up = ip("::1", 0);
	for (int s = socket(AF_INET6, SOCK_DGRAM, 0); bind(s, &up.a, size(&up)) != 0;) // until the loopback is up
		usleep(10000);
	const char *many[] = {"127.0.0.1", "127.0.0.2", "127.9.8.7"}, *six[] = {"::1", "::1", "::1"}, *mapped[] = {"::ffff:127.0.0.1", "::ffff:127.0.0.2", "::1"};
	queue(0, "127.0.0.3", "127.0.0.3", 5001, many);
	struct queue *q = queue(0, "0.0.0.0", "127.0.0.77", 5002, many);
	set(q->s, IPPROTO_IP, IP_PKTINFO, 1), set(q->s, IPPROTO_IP, IP_RECVTTL, 1), set(q->s, IPPROTO_IP, IP_RECVTOS, 1), q->pktinfo = 3;
	for (int i = 0; i < 3; i++)
		set(q->senders[i], IPPROTO_IP, IP_TTL, 33), set(q->senders[i], IPPROTO_IP, IP_TOS, 0x10);
	queue(0, "::1", "::1", 5003, six);
	queue(0, "::", "::1", 5004, six);
	queue(UDPLITE, "0.0.0.0", "127.0.0.1", 5005, many);
	q = queue(0, "0.0.0.0", "127.0.0.1", 5006, many);
	set(q->s, SOL_SOCKET, SO_PEEK_OFF, 2);
	set(q->s, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE), set(q->s, IPPROTO_IP, IP_MULTICAST_TTL, 9), set(q->s, IPPROTO_IP, IP_MULTICAST_LOOP, 0);
	set(q->s, IPPROTO_IP, IP_RECVERR, 1), set(q->s, IPPROTO_UDP, UDP_SEGMENT, 1200), set(q->s, IPPROTO_UDP, UDP_GRO, 1);
	(void)mapped;

	// Connected, with a datagram of the peer and none of others.
	int a = open_at(SOCK_DGRAM, 0, ip("127.0.0.1", 5101)), b = open_at(SOCK_DGRAM, 0, ip("127.0.0.4", 5102)), c = socket(AF_INET, SOCK_DGRAM, 0);
	address to = ip("127.0.0.4", 5102), back = ip("127.0.0.1", 5101);
	CHECK(connect(a, &to.a, size(&to)) == 0 && connect(b, &back.a, size(&back)) == 0 && connect(c, &to.a, size(&to)) == 0);

	int group = open_at(SOCK_DGRAM, 0, ip("0.0.0.0", 5201)), only = open_at(SOCK_DGRAM, 0, ip("0.0.0.0", 5202)), group6 = open_at(SOCK_DGRAM, 0, ip("::", 5203));
	join(group, "239.1.2.3", NULL, MCAST_JOIN_GROUP);
	join(group, "239.1.2.4", NULL, MCAST_JOIN_GROUP);
	join(group, "239.1.2.4", "127.0.0.1", MCAST_BLOCK_SOURCE);
	join(only, "239.1.2.5", "127.0.0.1", MCAST_JOIN_SOURCE_GROUP);
	join(only, "239.1.2.5", "127.0.0.2", MCAST_JOIN_SOURCE_GROUP);
	join(group6, "ff05::77", NULL, MCAST_JOIN_GROUP);
	int six_if = if_nametoindex("lo");
	set(group6, IPPROTO_IPV6, IPV6_MULTICAST_IF, six_if), set(group6, IPPROTO_IPV6, IPV6_MULTICAST_HOPS, 5);

	int icmp = socket(AF_INET, SOCK_RAW | SOCK_NONBLOCK, IPPROTO_ICMP), icmp6 = socket(AF_INET6, SOCK_RAW, IPPROTO_ICMPV6), header = socket(AF_INET, SOCK_RAW, 253);
	struct icmp6_filter f6;
	CHECK(icmp >= 0 && icmp6 >= 0 && header >= 0);
	set(icmp, 255, ICMP_FILTER, ~(1 << ICMP_ECHOREPLY));
	ICMP6_FILTER_SETBLOCKALL(&f6);
	ICMP6_FILTER_SETPASS(ICMP6_ECHO_REPLY, &f6);
	CHECK(setsockopt(icmp6, IPPROTO_ICMPV6, ICMP6_FILTER, &f6, sizeof f6) == 0);
	set(header, IPPROTO_IP, IP_HDRINCL, 1);
	int pings = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, IPPROTO_ICMP); // where the sysctl allows it
	if (argv[1])
		CHECK(pings >= 0);

	int frames = socket(AF_PACKET, SOCK_DGRAM | SOCK_NONBLOCK, 0), idle = socket(AF_PACKET, SOCK_RAW, 0);
	address ll = {.ll = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP), .sll_ifindex = if_nametoindex("lo")}}, was;
	struct sock_filter no[] = {BPF_STMT(BPF_RET | BPF_K, 0)};
	struct sock_fprog none = {1, no};
	CHECK(setsockopt(frames, SOL_SOCKET, SO_ATTACH_FILTER, &none, sizeof none) == 0);
	CHECK(bind(frames, &ll.a, size(&ll)) == 0);
	struct packet_mreq all = {.mr_ifindex = if_nametoindex("lo"), .mr_type = PACKET_MR_ALLMULTI};
	CHECK(setsockopt(frames, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &all, sizeof all) == 0);
	set(frames, SOL_PACKET, PACKET_AUXDATA, 1);
	set(frames, SOL_PACKET, PACKET_FANOUT, 77 | PACKET_FANOUT_LB << 16);

	int events = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK, NETLINK_ROUTE), asks = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	address nl = {.nl = {.nl_family = AF_NETLINK, .nl_pid = 12345, .nl_groups = RTMGRP_LINK}}, any = {.nl = {.nl_family = AF_NETLINK}};
	CHECK(bind(events, &nl.a, size(&nl)) == 0 && bind(asks, &any.a, size(&any)) == 0);
	set(events, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_NSID);
	set(events, SOL_NETLINK, NETLINK_EXT_ACK, 1);

	int asked[] = {NETLINK_ROUTE, NETLINK_SOCK_DIAG, NETLINK_GENERIC, NETLINK_XFRM}, lossy[4];
	for (int i = 0; i < 4; i++) {
		lossy[i] = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK, asked[i]);
		CHECK(lossy[i] >= 0);
		set(lossy[i], SOL_NETLINK, NETLINK_CAP_ACK, i % 2);
		ask_nonsense(lossy[i]);
	}

	int tcp = open_at(SOCK_STREAM, 0, ip("127.0.0.1", 5301)), optional = open_at(SOCK_DGRAM, 0, ip("127.0.0.1", 5302)), optional6 = open_at(SOCK_DGRAM, 0, ip("::1", 5303));
	char hop[8] = {0, 0, 1, 4}; // one padding option
	CHECK(setsockopt(tcp, IPPROTO_TCP, TCP_FASTOPEN_KEY, "the key of 16 B.", 16) == 0);
	set(tcp, IPPROTO_TCP, TCP_FASTOPEN, 5), set(tcp, SOL_SOCKET, SO_INCOMING_CPU, 0), set(tcp, SOL_SOCKET, SO_TXREHASH, 0);
	set(optional, SOL_SOCKET, SO_INCOMING_CPU, 1);
	CHECK(listen(tcp, 5) == 0);
	CHECK(setsockopt(optional, IPPROTO_IP, IP_OPTIONS, "\1\1\1\1", 4) == 0);
	CHECK(setsockopt(optional6, IPPROTO_IPV6, IPV6_HOPOPTS, hop, sizeof hop) == 0);

	for (int i = 0; i < nqueues; i++)
		fill(&queues[i]);
	CHECK(send(a, "to b", 4, 0) == 4);
	for (long round = 1;; round++) {
		socklen_t n = sizeof was;
		char data[64];
		for (int i = 0; i < nqueues; i++) {
			if (queues[i].to.in.sin_port == htons(5006))
				CHECK(value(queues[i].s, SOL_SOCKET, SO_PEEK_OFF) == 2);
			drain(&queues[i]), fill(&queues[i]);
			if (queues[i].to.in.sin_port == htons(5006))
				set(queues[i].s, SOL_SOCKET, SO_PEEK_OFF, 2);
		}
		int s = queues[5].s;
		CHECK(value(s, IPPROTO_IP, IP_MTU_DISCOVER) == IP_PMTUDISC_PROBE && value(s, IPPROTO_IP, IP_MULTICAST_TTL) == 9 && value(s, IPPROTO_IP, IP_MULTICAST_LOOP) == 0);
		CHECK(value(s, IPPROTO_IP, IP_RECVERR) == 1 && value(s, IPPROTO_UDP, UDP_SEGMENT) == 1200 && value(s, IPPROTO_UDP, UDP_GRO) == 1);
		CHECK(recv(b, data, sizeof data, 0) == 4 && !memcmp(data, "to b", 4) && recv(b, data, 1, 0) == -1);
		CHECK(send(a, "to b", 4, 0) == 4);
		CHECK(getpeername(c, &was.a, &n) == 0 && !memcmp(&was.in, &to.in, 8));
		n = sizeof was;

		CHECK(in_group(group, "239.1.2.3", MCAST_EXCLUDE, 0) && in_group(group, "239.1.2.4", MCAST_EXCLUDE, 1));
		CHECK(in_group(only, "239.1.2.5", MCAST_INCLUDE, 2) && !in_group(only, "239.1.2.3", 0, 0) && in_group(group6, "ff05::77", MCAST_EXCLUDE, 0));
		CHECK(value(group6, IPPROTO_IPV6, IPV6_MULTICAST_IF) == six_if && value(group6, IPPROTO_IPV6, IPV6_MULTICAST_HOPS) == 5);
		multicast(group, "239.1.2.3", 5201, 1);
		multicast(group, "239.1.2.4", 5201, 0);
		multicast(only, "239.1.2.5", 5202, 1);

		CHECK(value(icmp, 255, ICMP_FILTER) == ~(1 << ICMP_ECHOREPLY) && value(header, IPPROTO_IP, IP_HDRINCL) == 1 && value(header, SOL_SOCKET, SO_PROTOCOL) == 253);
		struct icmp6_filter now;
		n = sizeof now;
		CHECK(getsockopt(icmp6, IPPROTO_ICMPV6, ICMP6_FILTER, &now, &n) == 0 && !memcmp(&now, &f6, sizeof now));
		if (pings >= 0) {
			ping(pings);
			CHECK(recv(icmp, data, sizeof data, 0) > 0); // the reply alone
		}
		while (recv(icmp, data, sizeof data, 0) > 0)
			;

		n = sizeof was;
		CHECK(getsockname(frames, &was.a, &n) == 0 && was.ll.sll_protocol == htons(ETH_P_IP) && was.ll.sll_ifindex == (int)if_nametoindex("lo"));
		n = sizeof was;
		CHECK(getsockname(idle, &was.a, &n) == 0 && was.ll.sll_protocol == 0 && was.ll.sll_ifindex == 0);
		CHECK(value(frames, SOL_PACKET, PACKET_AUXDATA) == 1 && value(frames, SOL_PACKET, PACKET_FANOUT) == (77 | PACKET_FANOUT_LB << 16));
		CHECK(recv(frames, data, sizeof data, 0) == -1 && errno == EAGAIN); // the filter
		CHECK(setsockopt(frames, SOL_PACKET, PACKET_DROP_MEMBERSHIP, &all, sizeof all) == 0);
		CHECK(setsockopt(frames, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &all, sizeof all) == 0);

		uint32_t bits[8] = {0};
		n = sizeof bits;
		CHECK(getsockopt(events, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, bits, &n) == 0 && bits[0] == (1u << (RTNLGRP_LINK - 1) | 1u << (RTNLGRP_NSID - 1)));
		n = sizeof was;
		CHECK(getsockname(events, &was.a, &n) == 0 && was.nl.nl_pid == 12345 && value(events, SOL_NETLINK, NETLINK_EXT_ACK) == 1);
		struct { struct nlmsghdr h; struct ifinfomsg i; } ask = {{sizeof ask, RTM_GETLINK, NLM_F_REQUEST, round, 0}, {.ifi_index = 1}};
		char reply[8192];
		CHECK(send(asks, &ask, sizeof ask, 0) == sizeof ask && recv(asks, reply, sizeof reply, 0) > 0 && ((struct nlmsghdr *)reply)->nlmsg_seq == round);
		for (int i = 0; i < 4; i++) {
			CHECK(value(lossy[i], SOL_NETLINK, NETLINK_CAP_ACK) == i % 2);
			hear_refusal(lossy[i]), ask_nonsense(lossy[i]);
		}
		CHECK(same(tcp, IPPROTO_TCP, TCP_FASTOPEN_KEY, "the key of 16 B.", 16) && value(tcp, SOL_SOCKET, SO_INCOMING_CPU) == 0 && value(tcp, SOL_SOCKET, SO_TXREHASH) == 0);
		CHECK(same(optional, IPPROTO_IP, IP_OPTIONS, "\1\1\1\1", 4) && same(optional6, IPPROTO_IPV6, IPV6_HOPOPTS, hop, sizeof hop) && value(optional, SOL_SOCKET, SO_INCOMING_CPU) == 1);
		fprintf(report, "%ld\n", round);
		fflush(report);
		usleep(10000);
	}
}
