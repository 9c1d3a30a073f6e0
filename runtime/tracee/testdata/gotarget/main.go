// The gotarget keeps the Go runtime busy with what it does by signals and odd
// stacks: preemption, garbage collection, growing stacks, timers, channels. It
// counts rounds in a file that the test maps.
package main

import (
	"encoding/binary"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

type node struct {
	next  *node
	value uint64
}

// list builds a chain deep in the stack and checks it after its garbage was
// collected under it.
func list(depth int, n uint64) (sum uint64) {
	var pad [128]byte
	if depth > 0 {
		pad[depth%128] = byte(depth)
		return list(depth-1, n) + uint64(pad[depth%128]) - uint64(byte(depth))
	}
	var head *node
	for i := uint64(1); i <= n; i++ {
		head = &node{head, i}
	}
	for ; head != nil; head = head.next {
		sum += head.value
	}
	return sum
}

func main() {
	f, err := os.OpenFile(os.Args[1], os.O_RDWR, 0)
	if err != nil {
		panic(err)
	}
	mem, err := syscall.Mmap(int(f.Fd()), 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		panic(err)
	}
	var rounds, errors, signals atomic.Uint64
	winch := make(chan os.Signal, 64)
	signal.Notify(winch, syscall.SIGWINCH, syscall.SIGUSR1)
	go func() {
		for range winch {
			signals.Add(1)
		}
	}()
	for range 3 {
		go func() {
			for {
				if list(100, 2000) != 2000*2001/2 {
					errors.Add(1)
				}
				rounds.Add(1)
			}
		}()
	}
	ping, pong := make(chan uint64), make(chan uint64)
	go func() {
		for v := range ping {
			pong <- v + 1
		}
	}()
	for v := uint64(0); ; {
		start := time.Now()
		time.Sleep(time.Millisecond)
		if time.Since(start) < time.Millisecond {
			errors.Add(1)
		}
		if ping <- v; <-pong != v+1 {
			errors.Add(1)
		}
		v++
		for i, n := range []uint64{rounds.Load(), errors.Load(), 0, 0, signals.Load()} {
			binary.LittleEndian.PutUint64(mem[8*i:], n)
		}
		binary.LittleEndian.PutUint64(mem[62*64:], 1)
	}
}
