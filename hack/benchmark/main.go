// Command benchmark measures checkpoint and restore of ocickpt and, where a
// working criu is on PATH, of runc in the same run: wall time, stopped time,
// image size and peak memory, for a shell container and redis of two sizes.
// Between them dd writes as much to the same file system, as the measure of how
// fast an image could be written at all. It prints a markdown table of medians.
// It needs root, runc, redis-server and bin/ocickpt; hack/bench is the way to
// start it.
package main

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"slices"
	"time"
)

func main() {
	runs := flag.Int("runs", 5, "measured `runs` for each container; the biggest gets three at most")
	quick := flag.Bool("quick", false, "leave the biggest container out")
	flag.StringVar(&ocickpt.binary, "ocickpt", ocickpt.binary, "the `program` to measure")
	flag.Parse()
	if err := bench(*runs, *quick); err != nil {
		fmt.Fprintln(os.Stderr, "benchmark:", err)
		os.Exit(1)
	}
}

// workload is a container to measure.
type workload struct {
	name string
	mib  int // redis with so many MiB of values; 0 is the shell container
	runs int
}

// sample is one checkpoint and restore. Zero fields were not measured.
type sample struct {
	start, checkpoint, stopped, restore time.Duration
	written, read                       time.Duration // of the journey's own phases
	image                               int64         // bytes
	dumpRSS, restoreRSS                 int64         // bytes, peak of the process itself
}

func bench(runs int, quick bool) error {
	dir, err := os.MkdirTemp("", "ocickpt-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	workloads := []workload{{"shell", 0, 2 * runs}, {"redis 64 MiB", 64, runs}}
	if !quick {
		workloads = append(workloads, workload{"redis 1 GiB", 1024, min(runs, 3)})
	}
	tools := []tool{ocickpt}
	if reason := criuBroken(dir); reason != nil {
		fmt.Printf("runc checkpoint is left out: no working criu on PATH (%v)\n\n", reason)
	} else {
		tools = append(tools, runc)
	}
	t := &table{}
	for _, w := range workloads {
		medians, rate, err := measureAll(dir, w, tools)
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		t.add(w, tools, medians, rate)
	}
	fmt.Print(t)
	return nil
}

// measureAll takes the tools and dd in turns, so that what else the machine does
// meanwhile meets all of them. The first turn warms up and does not count. It
// returns the median of each tool and dd's rate, 0 for a workload that is too
// small to compare.
func measureAll(dir string, w workload, tools []tool) (medians []sample, rate float64, err error) {
	samples := make([][]sample, len(tools))
	var rates []float64
	for turn := range w.runs + 1 {
		for i, tool := range tools {
			s, err := measure(dir, w, tool)
			if err != nil {
				return nil, 0, fmt.Errorf("%s: %w", tool.name, err)
			}
			if turn > 0 {
				samples[i] = append(samples[i], s)
			}
		}
		if w.mib == 0 {
			continue
		}
		r, err := ddRate(dir, w.mib)
		if err != nil {
			return nil, 0, err
		}
		if turn > 0 {
			rates = append(rates, r)
		}
	}
	for _, s := range samples {
		medians = append(medians, median(s))
	}
	if len(rates) > 0 {
		rate = middle(rates, func(r float64) float64 { return r })
	}
	return medians, rate, nil
}

// median takes the median of each field by itself.
func median(samples []sample) (m sample) {
	m.start = middle(samples, func(s sample) time.Duration { return s.start })
	m.checkpoint = middle(samples, func(s sample) time.Duration { return s.checkpoint })
	m.stopped = middle(samples, func(s sample) time.Duration { return s.stopped })
	m.restore = middle(samples, func(s sample) time.Duration { return s.restore })
	m.written = middle(samples, func(s sample) time.Duration { return s.written })
	m.read = middle(samples, func(s sample) time.Duration { return s.read })
	m.image = middle(samples, func(s sample) int64 { return s.image })
	m.dumpRSS = middle(samples, func(s sample) int64 { return s.dumpRSS })
	m.restoreRSS = middle(samples, func(s sample) int64 { return s.restoreRSS })
	return m
}

func middle[S any, T cmp.Ordered](samples []S, field func(S) T) T {
	values := make([]T, len(samples))
	for i, s := range samples {
		values[i] = field(s)
	}
	slices.Sort(values)
	return values[len(values)/2]
}
