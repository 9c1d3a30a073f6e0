package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const redisKeys = 100_000

// redisContainer runs a real redis-server with redisKeys keys.
func redisContainer(t *testing.T) *container {
	t.Helper()
	c := newContainer(t, withHostPrograms(), withVaryingThreads(), withArgs("/usr/bin/redis-server",
		"--save", "", "--dir", "/out", "--enable-debug-command", "yes")).run().raiseLoopback()
	ping := func() bool {
		r := c.command(outputs{}, "nsenter", "-t", strconv.Itoa(c.state().Pid), "-n", "redis-cli", "ping")
		return strings.TrimSpace(r.stdout) == "PONG"
	}
	if !waitFor(ping) {
		t.Fatalf("redis does not answer\n%s", c.stderr())
	}
	const fill = `for i=1,tonumber(ARGV[1]) do redis.call('SET','key:'..i,'value '..i*7919) end return 'OK'`
	if got := c.redis("eval", fill, "0", strconv.Itoa(redisKeys)); got != "OK" {
		t.Fatalf("filling redis: %s", got)
	}
	return c
}

func (c *container) redis(args ...string) string {
	c.t.Helper()
	return strings.TrimSpace(c.inNetwork(append([]string{"redis-cli"}, args...)...))
}

// keysRight lets redis itself compare every key with what it was set to.
func (c *container) keysRight() {
	c.t.Helper()
	const count = `local n=0 for i=1,tonumber(ARGV[1]) do
		if redis.call('GET','key:'..i)=='value '..i*7919 then n=n+1 end end return n`
	if got := c.redis("eval", count, "0", strconv.Itoa(redisKeys)); got != strconv.Itoa(redisKeys) {
		c.t.Fatalf("%s of %d keys are right", got, redisKeys)
	}
}

// underLoad runs redis-benchmark in the container's network namespace for
// some seconds, kills it, and waits until its connections are closed.
func (c *container) underLoad() {
	c.t.Helper()
	pid := c.state().Pid
	load := exec.Command("nsenter", "-t", strconv.Itoa(pid), "-n", "redis-benchmark",
		"-q", "-n", "100000000", "-r", "5000", "-t", "set,incr,lpush", "-c", "20")
	c.must(load.Start())
	time.Sleep(2 * time.Second)
	load.Process.Kill()
	load.Wait()
	if !waitFor(func() bool { return established(pid) == 0 }) {
		c.t.Fatalf("%d connections are still open", established(pid))
	}
}

// established counts the connections in the process's network namespace that
// are neither listening (state 0A) nor only waiting for time to pass (06).
func established(pid int) (count int) {
	for _, name := range []string{"tcp", "tcp6"} {
		data, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "net", name))
		for i, line := range strings.Split(string(data), "\n") {
			fields := strings.Fields(line)
			if i > 0 && len(fields) > 3 && fields[3] != "0A" && fields[3] != "06" {
				count++
			}
		}
	}
	return count
}

// TestRedisUnderLoad freezes redis out of the middle of its work, twice.
func TestRedisUnderLoad(t *testing.T) {
	c := redisContainer(t)
	for generation := range 2 {
		c.underLoad()
		digest, runID := c.redis("debug", "digest"), c.redisInfo("run_id")
		if !waitFor(func() bool { return established(c.state().Pid) == 0 }) {
			t.Fatal("redis-cli's connection stays open")
		}
		c.checkpoint()
		c.mustBeGone()
		c.restore()
		c.raiseLoopback()
		if got := c.redis("debug", "digest"); got != digest {
			t.Fatalf("generation %d: digest of all data is %s, was %s", generation, got, digest)
		}
		if got := c.redisInfo("run_id"); got != runID {
			t.Fatalf("generation %d: redis has started again (run id %s, was %s)", generation, got, runID)
		}
		c.keysRight()
	}
	c.must(unix.Kill(c.state().Pid, unix.SIGTERM))
	select {
	case <-c.gone:
	case <-time.After(patience):
		t.Fatal("redis does not end on SIGTERM after its restore")
	}
	if !c.status.Exited() || c.status.ExitStatus() != 0 {
		t.Errorf("redis ended with status %#x", uint32(c.status))
	}
}

func (c *container) redisInfo(key string) string {
	c.t.Helper()
	for line := range strings.Lines(c.redis("info", "server")) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok && name == key {
			return value
		}
	}
	c.t.Fatal(fmt.Errorf("redis info has no %s", key))
	return ""
}
