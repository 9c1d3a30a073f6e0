// Command gopause is a Go program that holds state and checks it: goroutines
// that pass a ball, tickers and timers that must not be early, a listener on a
// unix socket, and memory that the garbage collector turns over all the time.
// Like the C programs it appends a growing number to /out/gopause after every
// good round, and "FAIL reason" when an invariant is broken.
package main

import (
	"fmt"
	"hash/crc32"
	"net"
	"os"
	"runtime"
	"time"
)

var report *os.File

func fail(format string, args ...any) {
	fmt.Fprintf(report, "FAIL "+format+"\n", args...)
	os.Exit(99)
}

// pingPong counts how often a ball went through four goroutines in a ring.
func pingPong() <-chan int {
	laps := make(chan int)
	ring := make([]chan int, 4)
	for i := range ring {
		ring[i] = make(chan int)
	}
	for i := range ring {
		go func() {
			for ball := range ring[i] {
				if i == len(ring)-1 {
					laps <- ball
				}
				ring[(i+1)%len(ring)] <- ball + 1
			}
		}()
	}
	go func() { ring[0] <- 0 }()
	return laps
}

// sleepOnTime fails when a timer fires before its time on the monotonic clock.
func sleepOnTime(d time.Duration) {
	for {
		start := time.Now()
		<-time.After(d)
		if took := time.Since(start); took < d {
			fail("timer of %v fired after %v", d, took)
		}
	}
}

// block is a piece of heap with a checksum of its own contents.
type block struct {
	data []byte
	sum  uint32
}

func newBlock(seed int) *block {
	b := &block{data: make([]byte, 4096+seed%8192)}
	for i := range b.data {
		b.data[i] = byte(i*seed + seed>>3)
	}
	b.sum = crc32.ChecksumIEEE(b.data)
	return b
}

// churn replaces some blocks and verifies all.
func churn(blocks []*block, round int) {
	for i := range 16 {
		blocks[(round*16+i)%len(blocks)] = newBlock(round*16 + i)
	}
	for i, b := range blocks {
		if crc32.ChecksumIEEE(b.data) != b.sum {
			fail("block %d changed", i)
		}
	}
	if round%50 == 0 {
		runtime.GC()
	}
}

// listen serves one byte to each connection to a unix socket.
func listen(path string) {
	os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		fail("listen: %v", err)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			fail("accept: %v", err)
		}
		c.Write([]byte("!"))
		c.Close()
	}
}

// connect asks the listener for its byte when the harness wants it; connections
// are not kept, so that none is open at a checkpoint.
func connect(path, wanted string) {
	if _, err := os.Stat(wanted); err != nil {
		return
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		fail("dial: %v", err)
	}
	var b [1]byte
	if _, err := c.Read(b[:]); err != nil || b[0] != '!' {
		fail("read: %q, %v", b[:], err)
	}
	c.Close()
	os.Remove(wanted)
}

func main() {
	var err error
	report, err = os.OpenFile("/out/gopause", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(97)
	}
	const socket = "/out/gopause.sock"
	go listen(socket)
	go sleepOnTime(300 * time.Millisecond)
	go sleepOnTime(2 * time.Second)
	blocks := make([]*block, 512)
	for i := range blocks {
		blocks[i] = newBlock(i)
	}
	laps := pingPong()
	tick := time.NewTicker(20 * time.Millisecond)
	for round := 1; ; round++ {
		if ball := <-laps; ball != 4*round-1 {
			fail("lap %d: the ball counts %d", round, ball)
		}
		churn(blocks, round)
		connect(socket, "/out/gopause.connect")
		<-tick.C
		fmt.Fprintf(report, "%d\n", round)
	}
}
