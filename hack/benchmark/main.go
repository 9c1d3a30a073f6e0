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
	writing, reading                    time.Duration // of the phases in which the image is written or read
	dd                                  float64       // bytes a second, in the same turn
	written, read                       float64       // medians alone: shares of dd
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
		medians, err := measureAll(dir, w, tools)
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		t.add(w, tools, medians)
	}
	fmt.Print(t)
	return nil
}

// measureAll takes the tools and dd in turns, so that what else the machine does
// meanwhile meets all of them; shares of dd are those of one turn. The first turn
// warms up and does not count. It returns the median of each tool.
func measureAll(dir string, w workload, tools []tool) (medians []sample, err error) {
	samples := make([][]sample, len(tools))
	for turn := range w.runs + 1 {
		dd := 0.0 // a container that is too small to compare
		if w.mib > 0 {
			if dd, err = ddRate(dir, w.mib); err != nil {
				return nil, err
			}
		}
		for i, tool := range tools {
			s, err := measure(dir, w, tool)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", tool.name, err)
			}
			s.dd = dd
			if turn > 0 {
				samples[i] = append(samples[i], s)
			}
		}
	}
	for _, s := range samples {
		medians = append(medians, median(s))
	}
	return medians, nil
}

// share is the rate at which an image of s was written or read in a time, of
// dd's in the same turn; 0 if either was not measured.
func (s sample) share(took time.Duration) float64 {
	if took == 0 || s.dd == 0 {
		return 0
	}
	return float64(s.image) / took.Seconds() / s.dd
}

// median takes the median of each field by itself.
func median(samples []sample) (m sample) {
	m.start = middle(samples, func(s sample) time.Duration { return s.start })
	m.checkpoint = middle(samples, func(s sample) time.Duration { return s.checkpoint })
	m.stopped = middle(samples, func(s sample) time.Duration { return s.stopped })
	m.restore = middle(samples, func(s sample) time.Duration { return s.restore })
	m.dd = middle(samples, func(s sample) float64 { return s.dd })
	m.written = middle(samples, func(s sample) float64 { return s.share(s.writing) })
	m.read = middle(samples, func(s sample) float64 { return s.share(s.reading) })
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
