package integration

import (
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/ocickpt/ocickpt/nsutil"
)

// withTun lets the container have tun devices.
func withTun() option {
	return func(_ *container, spec *specs.Spec) {
		major, minor := int64(10), int64(200)
		mode, root := os.FileMode(0o666), uint32(0)
		spec.Linux.Devices = append(spec.Linux.Devices, specs.LinuxDevice{Path: "/dev/net/tun", Type: "c", Major: major, Minor: minor, FileMode: &mode, UID: &root, GID: &root})
		if spec.Linux.Resources != nil {
			spec.Linux.Resources.Devices = append(spec.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &major, Minor: &minor, Access: "rwm"})
		}
	}
}

// withPing lets everybody have ping sockets.
func withPing() option {
	return func(_ *container, spec *specs.Spec) {
		spec.Linux.Sysctl = map[string]string{"net.ipv4.ping_group_range": "0 1000"}
	}
}

// lively is what a container does in its network namespace, by its own
// programs or from outside as the same user. NEST stands for the pid of a
// process in a network namespace of its own.
const lively = `
set -ex
ip link set lo up
ip addr add 127.0.0.9/32 dev lo label lo:x
ip link add br0 address 02:00:00:00:00:01 type bridge ageing_time 1234 forward_delay 300
ip link add v0 address 02:00:00:00:00:02 type veth peer name v1 address 02:00:00:00:00:03 mtu 1400
ip link add link v1 name m0 address 02:00:00:00:00:04 type macvlan mode bridge
ip link add name ifb7 address 02:00:00:00:00:05 type ifb
ip link add far0 address 02:00:00:00:00:06 type veth peer name near0 address 02:00:00:00:00:07 netns NEST
ip link set v0 master br0 alias "the port"
ip link set dev v0 type bridge_slave hairpin on cost 77
ip link property add dev v0 altname another-name
ip link set ifb7 promisc on txqueuelen 99
ip addr add 10.1.0.1/24 brd + dev br0
ip addr add 10.5.0.1/24 dev br0 scope site
ip addr add 10.1.0.2/24 dev br0
ip addr add 10.2.0.1 peer 10.2.0.9 dev m0 noprefixroute
ip addr add 10.3.0.1/24 dev far0
ip -6 addr add fd00::1/64 dev br0 nodad
ip -6 addr add fd00::2/64 dev v1
ip -6 addr add fd00:9::1/64 dev far0 preferred_lft 0
ip tuntap add t0 mode tap user 0
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 3 >/proc/sys/net/ipv4/conf/v1/rp_filter
echo 1 >/proc/sys/net/ipv6/conf/m0/disable_ipv6
echo 99 >/proc/sys/net/core/somaxconn
echo "2000 3000" >/proc/sys/net/ipv4/ip_local_port_range
for d in v0 v1 br0 m0 ifb7 far0; do ip link set $d up; done
nsenter -t NEST -n sh -c 'ip link set near0 up; ip addr add 10.3.0.2/24 dev near0; ip route add default via 10.3.0.1; ip link set lo up'
ip route add 10.9.0.0/16 via 10.1.0.77 dev br0 metric 5 mtu 1300 advmss 1000
ip route add 10.10.0.0/16 nexthop via 10.1.0.77 weight 3 nexthop via 10.3.0.2 weight 1
ip route add blackhole 10.11.0.0/16
ip route add table 77 default via 10.3.0.2 src 10.3.0.1
ip nexthop add id 5 via 10.3.0.2 dev far0
ip route add 10.12.0.0/16 nhid 5
ip -6 route add fd01::/64 via fd00::77 dev br0 metric 9
ip -6 route add fd02::/64 nexthop via fd00::77 dev br0 nexthop via fd00:9::77 dev far0
ip -6 route add unreachable fd03::/64
ip rule add pref 100 from 10.3.0.1 lookup 77
ip rule add pref 101 not fwmark 5/7 iif br0 suppress_prefixlength 0 table 77
ip -6 rule add pref 102 to fd09::/16 lookup 78
ip neigh add 10.1.0.77 lladdr 02:00:00:00:09:01 dev br0 nud permanent
ip neigh add proxy 10.1.0.78 dev br0
ip -6 neigh add fd00::77 lladdr 02:00:00:00:09:02 dev br0 nud permanent
nft -f - <<END
table inet filter {
	comment "of the test"
	counter total { packets 7 bytes 77 }
	set block { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.168.0.0-192.168.3.3 } }
	set seen { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1h; elements = { 10.1.1.1 . 80 timeout 30m } }
	map to { type inet_service : verdict; elements = { 22 : accept, 23 : jump other } }
	chain other {
		counter packets 5 bytes 55 comment "kept"
	}
	chain in {
		type filter hook input priority filter; policy accept;
		ip saddr @block tcp dport { 81, 82-90 } drop
		ct state established,related accept
		tcp dport vmap @to
		tcp dport 9999 counter name total
		tcp dport 9999 limit rate 5/minute burst 3 packets log prefix "x: " goto other
	}
}
table ip nat {
	chain post {
		type nat hook postrouting priority srcnat
		ip saddr 10.3.0.0/24 masquerade random
	}
	chain pre {
		type nat hook prerouting priority dstnat
		tcp dport 8080 dnat to 10.3.0.2:80
	}
}
table netdev ing {
	chain c { type filter hook ingress device "v1" priority 0; }
}
table bridge b {
	chain f {
		type filter hook forward priority 0
		ether saddr 02:00:00:00:00:02 accept
	}
}
END
`

// counting is what differs between two looks at a thing that does not change:
// counters, times that are left, ages.
var counting = regexp.MustCompile(`"(gc|hello|tcn|topology_change|hold|message_age|forward_delay)_timer": *[0-9.]+|expires \S+|(valid|preferred)_life_time": *[0-9]{1,9}\b`)

// network is all that tools show of the network namespace of a process.
func (c *container) network(pid int) string {
	c.t.Helper()
	const script = `ip -d -j -p addr; ip -d route show table all; ip -d -6 route show table all; ip nexthop; ip rule; ip -6 rule
		ip neigh show nud permanent; ip neigh show proxy; ip -6 neigh show nud permanent; nft list ruleset
		cd /proc/sys/net; grep -rs . ipv4 ipv6 core netfilter unix | grep -v -e _secret -e nf_conntrack_count -e fastopen_key -e neigh/ | sort`
	r := c.command(outputs{}, "nsenter", "-t", strconv.Itoa(pid), "-n", "sh", "-c", script)
	if r.code != 0 {
		c.t.Fatalf("exit status %d\n%s", r.code, r.stderr)
	}
	return counting.ReplaceAllString(r.stdout, "")
}

// TestNetwork checkpoints and restores a container that has much in its network
// namespace and in one of a task's.
func TestNetwork(t *testing.T) {
	c := newContainer(t, withTun(), withReport("network"), withCapabilities("CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_NET_RAW"),
		withArgs("sh", "-c", "unshare -n sh -c 'while :; do sleep 1000; done' & i=0; while :; do i=$((i+1)); echo $i >>/out/network; sleep 0.02; done")).run()
	c.progress(5)
	nest := func() int {
		pids, err := filepath.Glob("/proc/" + strconv.Itoa(c.state().Pid) + "/task/*/children")
		c.must(err)
		own, err := os.Readlink("/proc/" + strconv.Itoa(c.state().Pid) + "/ns/net")
		c.must(err)
		for _, p := range pids {
			b, err := os.ReadFile(p)
			c.must(err)
			for f := range strings.FieldsSeq(string(b)) {
				if ns, _ := os.Readlink("/proc/" + f + "/ns/net"); ns != "" && ns != own {
					pid, err := strconv.Atoi(f)
					c.must(err)
					return pid
				}
			}
		}
		t.Fatal("no process in another network namespace")
		return 0
	}
	c.inNetwork("sh", "-c", strings.ReplaceAll(lively, "NEST", strconv.Itoa(nest())))
	var own, nested string
	if !waitFor(func() bool { // addresses and carriers settle
		before, inner := own, nested
		own, nested = c.network(c.state().Pid), c.network(nest())
		return own == before && nested == inner && !strings.Contains(own+nested, "tentative")
	}) {
		t.Fatal("the network does not come to rest")
	}
	for range 2 {
		c.checkpoint()
		c.mustBeGone()
		c.restore()
		same := func() bool { return own == c.network(c.state().Pid) && nested == c.network(nest()) }
		if !waitFor(same) {
			t.Errorf("(-before +after)\n%s\n%s", cmp.Diff(own, c.network(c.state().Pid)), cmp.Diff(nested, c.network(nest())))
		}
		c.inNetwork("/bin/busybox", "ping", "-c1", "-W2", "10.3.0.2")
		c.progress(5)
	}
	c.checkpoint("--leave-running")
	c.progress(5)
}

// admin is a container that may change its network namespace.
func admin(t *testing.T, options ...option) *container {
	c := newContainer(t, append([]option{withReport("n"), withArgs("sh", "-c", "i=0; while :; do i=$((i+1)); echo $i >>/out/n; sleep 0.02; done"), withCapabilities("CAP_NET_ADMIN")}, options...)...).run()
	c.progress(2)
	return c
}

// TestNetworkRefused meets what is not saved of a network namespace, and leaves
// all of it to the engine.
func TestNetworkRefused(t *testing.T) {
	c := admin(t)
	c.raiseLoopback()
	for _, r := range []struct{ make, take, say string }{
		{"tc qdisc add dev lo root handle 5: pfifo", "tc qdisc del dev lo root", "lo: it has a queueing discipline of its own"},
		{"nft add table t; nft add chain t c; nft add rule t c ip ttl 1 jump { accept \\; }", "nft delete table t", "nftables: a rule has a chain without a name"},
		{"ip link add s type vxlan id 1 dstport 4789", "ip link del s", "s: devices of type vxlan are not supported"},
		{"ip xfrm policy add src 10.0.0.1 dst 10.0.0.2 dir out", "ip xfrm policy flush", "IPsec: it has a policy"},
	} {
		c.inNetwork("sh", "-c", r.make)
		result := c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id)
		if result.code == 0 || !strings.Contains(result.stderr, r.say) {
			t.Errorf("%s: exit status %d\n%s", r.make, result.code, result.stderr)
		}
		c.inNetwork("sh", "-c", r.take)
	}
	c.progress(3)
	c.inNetwork("sh", "-c", "ip link add i type ifb; ip addr add 10.9.9.9/24 dev i; nft add table t; ip rule add pref 9 from 10.9.9.9 lookup main")
	c.checkpoint()
	c.mustBeGone()
	c.restore("--empty-ns", "network")
	if links := c.inNetwork("ip", "-br", "link"); strings.Contains(links, "\ni ") {
		t.Errorf("what is left to the engine: %s", links)
	}
	c.progress(3)
	c.checkpoint("--empty-ns", "network")
	c.mustBeGone()
	c.restore()
	c.progress(3)
}

// TestNetworkOfEngine has a device of which one end is outside: a hook makes it
// again, with its address, and what the container has set goes back beside it.
func TestNetworkOfEngine(t *testing.T) {
	hook := func(c *container, spec *specs.Spec) {
		script := "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); ip link add " + c.id + " type veth peer name eth0 netns $pid && nsenter -t $pid -n sh -c 'ip addr add 10.44.0.2/24 dev eth0; ip link set eth0 up; ip route add default via 10.44.0.1'"
		spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: []string{"PATH=" + os.Getenv("PATH")}}}}
	}
	c := admin(t, hook)
	c.raiseLoopback()
	c.inNetwork("sh", "-c", "ip addr add 10.44.9.9/32 dev lo; ip route add blackhole 10.45.0.0/16; nft add table ip mine")
	look := func() string { return c.inNetwork("sh", "-c", "ip -br addr; ip route; nft list ruleset") }
	before := strings.ReplaceAll(look(), "eth0@if", "eth0@")
	number := regexp.MustCompile(`eth0@[a-z]*[0-9]+ +[A-Z]+|fe80:\S+`)
	c.checkpoint()
	c.mustBeGone()
	c.restore()
	if diff := cmp.Diff(number.ReplaceAllString(before, ""), number.ReplaceAllString(strings.ReplaceAll(look(), "eth0@if", "eth0@"), "")); diff != "" {
		t.Errorf("(-before +after)\n%s", diff)
	}
	c.progress(3)
	if r := c.ocickpt("inspect", c.image()+"/checkpoint.img"); !strings.Contains(r.stdout, "network device eth0 is not saved") {
		t.Errorf("no warning:\n%s", r.stdout)
	}
}

// TestDatagramsMove restores a server of UDP in a network where it has another
// address; a datagram that has waited is answered from there.
func TestDatagramsMove(t *testing.T) {
	const server = `import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("` + insideV4 + `", 7))
n = 0
while True:
    n += 1
    print(n, file=open("/out/n", "a"), flush=True)
    time.sleep(0.1)
    s.setblocking(False)
    try:
        data, peer = s.recvfrom(100)
        s.sendto(data, peer)
    except BlockingIOError:
        pass
`
	n := newNetwork(t, false)
	c := newContainer(t, withReport("n"), withHostPrograms(), withArgs("/usr/bin/python3", "-c", server), withCapabilities("CAP_NET_BIND_SERVICE"), n.join(false)).run()
	c.progress(2)
	c.must(nsutil.Inside(n.outside, func() error {
		client, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(outsideV4)})
		if err != nil {
			return err
		}
		defer client.Close()
		ask := func(to, text string) {
			_, err := client.WriteToUDP([]byte(text), &net.UDPAddr{IP: net.ParseIP(to), Port: 7})
			c.must(err)
		}
		hear := func(from, text string) {
			t.Helper()
			buf := make([]byte, 100)
			c.must(client.SetReadDeadline(time.Now().Add(patience)))
			size, at, err := client.ReadFromUDP(buf)
			c.must(err)
			if string(buf[:size]) != text || at.IP.String() != from || at.Port != 7 {
				t.Errorf("%q from %s, not %q from %s", buf[:size], at, text, from)
			}
		}
		ask(insideV4, "before")
		hear(insideV4, "before")
		c.runc("pause", c.id)
		ask(insideV4, "waits")
		time.Sleep(50 * time.Millisecond)
		c.checkpoint()
		c.mustBeGone()
		n.ip(n.inside, "addr", "del", insideV4+"/24", "dev", "eth0")
		n.ip(n.inside, "addr", "add", insideOther+"/24", "dev", "eth0")
		c.restore("--address-map", insideV4+"="+insideOther)
		hear(insideOther, "waits")
		ask(insideOther, "after")
		hear(insideOther, "after")
		return nil
	}))
}
