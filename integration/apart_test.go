package integration

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// runTests runs the tests that were asked for. A journey reaps whatever becomes a
// child of its process, so two of them cannot share one. But most of their time
// they wait, so each test gets a process of its own, and some run side by side.
func runTests(m *testing.M) int {
	names, err := selected()
	if err != nil {
		fmt.Fprintf(os.Stderr, "list the tests: %v\n", err)
		return 1
	}
	if len(names) < 2 {
		return m.Run()
	}
	return runApart(names)
}

// selected lists the top-level tests that the flags of go test choose; none if
// this process is to run what it was told itself.
func selected() ([]string, error) {
	pattern := flag.Lookup("test.run").Value.String()
	if os.Getenv(envFixtures) != "" || flag.Lookup("test.list").Value.String() != "" || strings.Contains(pattern, "/") {
		return nil, nil
	}
	out, err := again("-test.list=" + cmp.Or(pattern, ".")).Output()
	return strings.Fields(string(out)), err
}

// runApart runs each test by a process of its own and prints what it says when
// it has ended.
func runApart(names []string) (code int) {
	queue := make(chan string)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range runtime.NumCPU() + 1 {
		wg.Go(func() {
			for name := range queue {
				out, err := runOne(name)
				mu.Lock()
				os.Stdout.Write(out)
				if err != nil {
					fmt.Printf("%s: %v\n", name, err)
					code = 1
				}
				mu.Unlock()
			}
		})
	}
	for _, name := range names {
		queue <- name
	}
	close(queue)
	wg.Wait()
	return code
}

// runOne runs one test with the flags of this process.
func runOne(name string) ([]byte, error) {
	args := append(os.Args[1:len(os.Args):len(os.Args)], "-test.run=^"+name+"$")
	out, err := again(args...).CombinedOutput()
	return bytes.TrimSuffix(out, []byte("PASS\n")), err
}

// again is this program once more, with what it has built.
func again(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), envFixtures+"="+fixtures)
	return cmd
}
