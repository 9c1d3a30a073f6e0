package integration

import (
	"bytes"
	"cmp"
	"crypto/md5"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// withServices runs nginx, redis, PostgreSQL and sshd, as they come from Debian, with
// clients of their own inside: redis-cli over a unix socket, which writes the report,
// and ssh over loopback.
func withServices() option {
	const script = `#!/bin/sh -e
		export PATH=/usr/sbin:/usr/bin:/sbin:/bin
		cd /out
		ip link set lo up
		mkdir -p /run/sshd pg www
		chown postgres pg
		chown www-data www
		postgres() { program=$1; shift; setpriv --reuid=postgres --regid=postgres --clear-groups $(ls -d /usr/lib/postgresql/*/bin | tail -n1)/$program -D /out/pg "$@"; }
		nginx -e stderr -c /out/nginx.conf &
		redis-server --save '' --protected-mode no --unixsocket /run/redis.socket --dir /out >redis.log &
		ssh-keygen -q -t ed25519 -N '' -f host
		ssh-keygen -q -t ed25519 -N '' -f key
		cp key.pub keys
		/usr/sbin/sshd -D -e -f /out/sshd.conf &
		postgres initdb -A trust -N >/dev/null
		postgres postgres -c listen_addresses='*' -c fsync=off -c unix_socket_directories=/tmp &
		echo 'host all all all trust' >>pg/pg_hba.conf
		until redis-cli -s /run/redis.socket ping; do sleep 0.05; done >/dev/null
		while echo INCR rounds; do sleep 0.02; done | redis-cli -s /run/redis.socket >inside &
		until ssh -F ssh.conf -p 22 127.0.0.1 true; do sleep 0.05; done
		i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done | ssh -F ssh.conf -p 22 127.0.0.1 cat >tunnel &
		until psql -h /tmp -U postgres -c 'select 1'; do sleep 0.05; done >/dev/null 2>&1
		touch ready
		wait
	`
	files := map[string]string{
		"services": script,
		"nginx.conf": `daemon off; user www-data; worker_processes 2; pid /run/nginx.pid;
			events {}
			http {
				access_log off; sendfile on; client_max_body_size 0;
				server { listen [::]:80 ipv6only=off; root /out/www; location /up/ { dav_methods PUT; create_full_put_path on; } }
			}`,
		"sshd.conf": "Port 22\nHostKey /out/host\nAuthorizedKeysFile /out/keys\nStrictModes no\nPermitRootLogin yes\nPidFile none\n",
		"ssh.conf":  "Host *\nUser root\nIdentityFile /out/key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n",
	}
	// As Docker gives them.
	capabilities := withCapabilities("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
		"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_SYS_CHROOT", "CAP_NET_ADMIN")
	return func(c *container, spec *specs.Spec) {
		withHostPrograms()(c, spec)
		capabilities(c, spec)
		withNewPrivileges()(c, spec)
		withNofile()(c, spec)
		c.must(os.MkdirAll(c.out(""), 0o777))
		for name, text := range files {
			c.must(os.WriteFile(c.out(name), []byte(text), 0o755))
		}
		withArgs("/out/services")(c, spec)
		withReport("inside")(c, spec)
	}
}

// client is a program of the host's outside of the container, in the other network
// namespace.
type client struct {
	t       testing.TB
	name    string
	cmd     *exec.Cmd
	in, out *os.File
	got     []byte // read, but not yet asked for
}

// client starts one.
func (n *network) client(t testing.TB, name string, args ...string) *client {
	t.Helper()
	c := &client{t: t, name: name, cmd: exec.Command("nsenter", append([]string{"--net=" + n.outside, name}, args...)...)}
	var theirs [2]*os.File
	for i, ends := range [][2]**os.File{{&theirs[0], &c.in}, {&c.out, &theirs[1]}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		*ends[0], *ends[1] = r, w
		defer theirs[i].Close()
	}
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = theirs[0], theirs[1], os.Stderr
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.cmd.Process.Kill()
		c.cmd.Wait()
		c.in.Close()
		c.out.Close()
	})
	return c
}

// say writes a line to the program.
func (c *client) say(line string) {
	c.t.Helper()
	if _, err := io.WriteString(c.in, line+"\n"); err != nil {
		c.t.Fatalf("%s: %v", c.name, err)
	}
}

// hears waits for a text, and drops what comes before.
func (c *client) hears(text string) {
	c.t.Helper()
	c.out.SetReadDeadline(time.Now().Add(patience))
	for buf := make([]byte, 4096); ; {
		if at := bytes.Index(c.got, []byte(text)); at >= 0 {
			c.got = c.got[at+len(text):]
			return
		}
		n, err := c.out.Read(buf)
		c.got = append(c.got, buf[:n]...)
		if err != nil {
			c.t.Fatalf("%s: %v instead of %q; there is %q", c.name, err, text, c.got)
		}
	}
}

// answers asserts what it hears when it has said something.
func (c *client) answers(line, text string) {
	c.t.Helper()
	c.say(line)
	c.hears(text)
}

// ends waits until the program has ended well.
func (c *client) ends() {
	c.t.Helper()
	c.in.Close()
	ended := make(chan error, 1)
	go func() { ended <- c.cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			c.t.Errorf("%s: %v", c.name, err)
		}
	case <-time.After(patience):
		c.t.Errorf("%s does not end", c.name)
	}
}

// numbers is a stream of n numbers.
func numbers(n uint32) []byte {
	b := make([]byte, 0, 4*n)
	for i := range n {
		b = binary.LittleEndian.AppendUint32(b, i)
	}
	return b
}

// rows are those that a query of PostgreSQL gives.
func rows(from, n int) []byte {
	var b []byte
	for i := from; i < from+n; i++ {
		b = fmt.Appendf(b, "%d\t%x\n", i, md5.Sum(fmt.Append(nil, i)))
	}
	return b
}

// stream compares what comes out of a program with what has to come.
type stream struct {
	*client
	next func(n int) []byte // at most n bytes
}

// takes reads n bytes, or all there are for n < 0.
func (s *stream) takes(n int) {
	s.t.Helper()
	s.out.SetReadDeadline(time.Now().Add(patience))
	for n != 0 {
		want := s.next(cmp.Or(max(n, 0), 1<<20))
		if len(want) == 0 {
			break
		}
		got := make([]byte, len(want))
		if read, err := io.ReadFull(s.out, got); err != nil || !bytes.Equal(got, want) {
			s.t.Fatalf("%s: after %d of %d bytes %v, or they are others", s.name, read, len(want), err)
		}
		n -= len(want)
	}
	if n < 0 {
		if more, err := s.out.Read(make([]byte, 1)); more != 0 || err != io.EOF {
			s.t.Fatalf("%s: there is more than there should be: %v", s.name, err)
		}
	}
}

// of streams the bytes of all.
func of(all []byte) func(n int) []byte {
	return func(n int) []byte {
		part := all[:min(n, len(all))]
		all = all[len(part):]
		return part
	}
}

// ofRows streams rows.
func ofRows(count int) func(n int) []byte {
	next := 1
	return func(n int) []byte {
		part := rows(next, min(max(1, n/32), count+1-next))
		next += bytes.Count(part, []byte("\n"))
		return part
	}
}

// users are people at work with the services.
type users struct {
	n *network
	// Of slow and query something always waits; quick is read as it comes.
	slow, quick, query     *stream
	upload, copying        *client
	redis, terminal        *client
	content                []byte // of downloads and of the upload
	copied                 int    // rows
	stop                   chan struct{}
	reading, sending, rows chan struct{} // closed when that is done
	idle                   []*peer
	steps                  int
}

const queryRows = 300_000

func (n *network) users(t *testing.T, c *container) *users {
	t.Helper()
	u := &users{n: n, content: numbers(16 << 20), stop: make(chan struct{})}
	c.must(os.WriteFile(c.out("www/numbers"), u.content, 0o644))
	download := func(address string, more ...string) *stream {
		return &stream{n.client(t, "curl", append(more, "-sS", "http://"+address+"/numbers")...), of(u.content)}
	}
	u.slow, u.quick = download(insideV4), download("["+insideV6+"]", "--limit-rate", "6M")
	u.upload = n.client(t, "curl", "-sS", "-T", "-", "http://"+insideV4+"/up/numbers")
	u.redis = n.client(t, "redis-cli", "-h", insideV4)
	u.redis.answers("SET a 1", "OK\n")
	u.redis.answers("MULTI", "OK\n")
	psql := []string{"-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-h", insideV4, "-U", "postgres"}
	u.query = &stream{n.client(t, "psql", append(psql, "-c", fmt.Sprintf("COPY (SELECT g, md5(g::text) FROM generate_series(1, %d) g) TO STDOUT", queryRows))...), ofRows(queryRows)}
	u.copying = n.client(t, "psql", psql...)
	u.copying.say("BEGIN; CREATE TABLE t (i int); COPY t FROM STDIN;")
	u.terminal = n.client(t, "ssh", "-tt", "-F", c.out("ssh.conf"), "-i", c.out("key"), insideV4)
	u.terminal.answers("step=0; echo ready-$step", "ready-0\r\n")
	for range 100 {
		u.idle = append(u.idle, n.dialPort(t, insideV4, "6379"))
	}
	u.reading, u.sending, u.rows = background(u.read), background(u.send), background(u.copyRows)
	return u
}

// background runs f and closes what it returns at the end.
func background(f func()) chan struct{} {
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	return done
}

// read takes the quick download as it comes.
func (u *users) read() { u.quick.takes(-1) }

// send sends the upload in pieces, and what is left of it when all stop.
func (u *users) send() {
	defer u.upload.in.Close()
	rest := u.content
	for len(rest) > 0 {
		part := rest[:min(len(rest), 64<<10)]
		if _, err := u.upload.in.Write(part); err != nil {
			u.upload.t.Errorf("upload: %v", err)
			return
		}
		rest = rest[len(part):]
		u.pause()
	}
}

// copyRows sends rows until all stop.
func (u *users) copyRows() {
	for u.pause() {
		var some []byte
		for range 500 {
			u.copied++
			some = fmt.Appendf(some, "%d\n", u.copied)
		}
		if _, err := u.copying.in.Write(some); err != nil {
			u.copying.t.Errorf("rows: %v", err)
			return
		}
	}
}

// pause waits a little, and reports whether all go on.
func (u *users) pause() bool {
	select {
	case <-u.stop:
		return false
	case <-time.After(5 * time.Millisecond):
		return true
	}
}

// good lets everybody go on for a while.
func (u *users) good(c *container) {
	c.t.Helper()
	u.steps++
	u.slow.takes(4 << 20)
	u.query.takes(1 << 20)
	u.redis.answers("INCR a", "QUEUED\n")
	u.terminal.answers("step=$((step+1)); echo now-$step", fmt.Sprintf("now-%d\r\n", u.steps))
	for _, p := range u.idle {
		p.asks(c.t, "PING\r\n", "+PONG\r\n")
	}
	c.progress(5)
	u.n.noReset(c.t)
}

// finish brings all to their ends, and compares what has come with what was sent.
func (u *users) finish(c *container) {
	c.t.Helper()
	close(u.stop)
	u.slow.takes(-1)
	u.query.takes(-1)
	<-u.reading
	<-u.sending
	<-u.rows
	var sums strings.Builder
	for i := range u.steps {
		fmt.Fprintln(&sums, i+2)
	}
	u.redis.answers("EXEC", sums.String())
	u.copying.answers("\\.\nSELECT count(*), sum(i) FROM t; COMMIT;", fmt.Sprintf("%d|%d\n", u.copied, u.copied*(u.copied+1)/2))
	u.terminal.say("exit")
	for _, one := range []*client{u.slow.client, u.quick.client, u.query.client, u.upload, u.copying, u.redis, u.terminal} {
		one.ends()
	}
	if got, err := os.ReadFile(c.out("www/up/numbers")); err != nil || !bytes.Equal(got, u.content) {
		c.t.Errorf("the upload: %d bytes that are not those that were sent, %v", len(got), err)
	}
	whole, err := os.ReadFile(c.out("tunnel"))
	c.must(err)
	for i, line := range strings.Fields(string(whole)) {
		if line != fmt.Sprint(i+1) {
			c.t.Fatalf("line %d that came through ssh is %q", i+1, line)
		}
	}
	u.n.noReset(c.t)
}

// elsewhere makes another pair of namespaces, in which the container has another
// address, with a router in it that the first pair's outside knows: to the container's
// peers nothing may change.
func (n *network) elsewhere(t *testing.T) *network {
	other := newNetwork(t, false)
	other.ip(other.inside, "addr", "flush", "dev", "eth0", "scope", "global")
	other.ip(other.outside, "addr", "flush", "dev", "br0", "scope", "global")
	n.ip(n.outside, "link", "add", "router", "type", "veth", "peer", "name", "world", "netns", other.outside)
	commands := strings.NewReplacer("V4", insideV4, "V6", insideV6).Replace(`
		out link set router master br0 up
		router link set world up
		router addr add 10.77.0.3/24 dev world
		router addr add fd77::3/64 dev world nodad
		router addr add 10.78.0.2/24 dev br0
		router addr add fd78::2/64 dev br0 nodad
		in addr add 10.78.0.1/24 dev eth0
		in addr add fd78::1/64 dev eth0 nodad
		in route add default via 10.78.0.2
		in route add default via fd78::2
		out route add V4 via 10.77.0.3
		out route add V6 via fd77::3`)
	where := map[string]string{"out": n.outside, "router": other.outside, "in": other.inside}
	for line := range strings.Lines(strings.TrimSpace(commands)) {
		words := strings.Fields(line)
		n.ip(where[words[0]], words[1:]...)
	}
	nft := exec.Command("nsenter", "--net="+other.outside, "sh", "-c", "sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1; nft -f -")
	nft.Stdin = strings.NewReader(strings.NewReplacer("V4", insideV4, "V6", insideV6).Replace(`table inet moved {
		chain in { type filter hook prerouting priority -300; ip daddr V4 ip daddr set 10.78.0.1; ip6 daddr V6 ip6 daddr set fd78::1; }
		chain out { type filter hook postrouting priority 300; ip saddr 10.78.0.1 ip saddr set V4; ip6 saddr fd78::1 ip6 saddr set V6; }
	}`))
	if err := runCmd(nft); err != nil {
		t.Fatal(err)
	}
	return other
}

// joinLater changes the bundle, so that the next restore is in that namespace.
func (n *network) joinLater(c *container) {
	data, err := os.ReadFile(filepath.Join(c.bundle, "config.json"))
	c.must(err)
	spec := &specs.Spec{}
	c.must(json.Unmarshal(data, spec))
	n.join(false)(c, spec)
	c.writeSpec(spec)
}

// TestClients has people work with real services while these go away and come back,
// and at last move to another network.
func TestClients(t *testing.T) {
	n := newNetwork(t, false)
	c := newContainer(t, withServices(), withVaryingThreads(), withConnections(), n.join(false)).run()
	if !waitFor(func() bool { _, err := os.Stat(c.out("ready")); return err == nil }) {
		t.Fatalf("the services do not come up\n%s", c.stderr())
	}
	u := n.users(t, c)
	u.good(c)
	// Some of the programs outside stand still meanwhile, others go on.
	journey := func(act func()) {
		t.Helper()
		for _, one := range []*client{u.slow.client, u.copying} {
			c.must(one.cmd.Process.Signal(unix.SIGSTOP))
		}
		act()
		for _, one := range []*client{u.slow.client, u.copying} {
			c.must(one.cmd.Process.Signal(unix.SIGCONT))
		}
		u.good(c)
	}
	for range 2 {
		journey(func() {
			c.checkpoint()
			c.mustBeGone()
			c.restore()
		})
		journey(func() { c.checkpoint("--leave-running") })
	}
	var other *network
	journey(func() {
		c.checkpoint()
		c.mustBeGone()
		n.ip(n.inside, "link", "del", "eth0")
		other = n.elsewhere(t)
		other.joinLater(c)
		c.restore("--address-map", insideV4+"=10.78.0.1", "--address-map", insideV6+"=fd78::1")
	})
	u.finish(c)
	other.noReset(t)
}
