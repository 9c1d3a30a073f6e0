package runtime

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// machine describes this machine's processor as far as saved registers depend
// on it.
func machine() image.Arch {
	a := image.Arch{PageSize: image.PageSize}
	a.XFeatures, a.XSize, a.XLayout = task.MachineXState()
	info := cpuInfo("model name", "flags")
	a.Model, a.Features = info["model name"], strings.Fields(info["flags"])
	return a
}

// cpuInfo reads lines about the first processor. The others are not read: making
// up the text for all of them takes the kernel milliseconds on large machines.
func cpuInfo(keys ...string) map[string]string {
	found := map[string]string{}
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return found
	}
	defer f.Close()
	for scan := bufio.NewScanner(f); len(found) < len(keys) && scan.Scan(); {
		key, value, _ := strings.Cut(scan.Text(), ":")
		if key = strings.TrimSpace(key); slices.Contains(keys, key) {
			found[key] = strings.TrimSpace(value)
		}
	}
	return found
}

// fitXState lays the extended state of every thread out for this processor. It
// refuses one that holds what this processor has no room for.
func fitXState(head *image.Head, here *image.Arch) error {
	same := here.XSize == head.Arch.XSize && slices.Equal(here.XLayout, head.Arch.XLayout)
	for _, t := range head.Tasks {
		for i := range t.Threads {
			th := &t.Threads[i]
			if lacking := (task.UsedXFeatures(th.XState) | t.XFeatures) &^ here.XFeatures; lacking != 0 {
				return fail.In(fmt.Sprintf("task %d", t.Pid), fail.Refuse(fmt.Sprintf("thread %d", th.Tid),
					fmt.Sprintf("it uses registers that this processor lacks: %s", strings.Join(task.XFeatureNames(lacking), ", ")), "restore on a processor that has them"))
			}
			if same {
				continue
			}
			moved, err := task.MoveXState(th.XState, head.Arch.XLayout, here.XLayout, here.XSize)
			if err != nil {
				return fail.In(fmt.Sprintf("task %d", t.Pid), fail.On(fmt.Sprintf("thread %d", th.Tid), err))
			}
			th.XState = moved
		}
	}
	return nil
}

// advice is what programs may notice of another processor without breaking.
func advice(then, here *image.Arch) (notes []string) {
	if then.Model != here.Model {
		notes = append(notes, fmt.Sprintf("the image is of a processor %q, this one is %q", then.Model, here.Model))
	}
	if more := here.XFeatures &^ then.XFeatures; more != 0 {
		notes = append(notes, fmt.Sprintf("this processor has registers that the image's had not (%s): programs that have measured their state will save less of it", strings.Join(task.XFeatureNames(more), ", ")))
	}
	return notes
}

// requiredFeatures are flags that change what an xsave area holds or what
// compiled code, having tested for them once, goes on using.
func requiredFeatures(have, need []string) (missing []string) {
	set := map[string]bool{}
	for _, f := range have {
		set[f] = true
	}
	for _, f := range need {
		if !set[f] && userVisible(f) {
			missing = append(missing, f)
		}
	}
	return missing
}

// userVisible tells instruction-set extensions, by the way the kernel names
// them, from properties of the machine or of the kernel itself.
func userVisible(flag string) bool {
	if flag == "xsaves" || flag == "xsaveerptr" { // the kernel's own
		return false
	}
	for _, prefix := range []string{
		"fpu", "cmov", "cx8", "cx16", "mmx", "fxsr", "sse", "ssse", "misalignsse", "avx", "amx", "apx", "fma", "xop", "tbm", "lwp", "3dnow",
		"aes", "vaes", "pclmul", "vpclmul", "gfni", "sha", "sm3", "sm4", "f16c", "bmi", "popcnt", "movbe", "abm", "lzcnt", "adx", "lahf",
		"rdrand", "rdseed", "rdpid", "rdtscp", "rdpru", "fsgsbase", "xsave", "xgetbv1", "clflush", "clwb", "clzero", "mwaitx", "movdir",
		"enqcmd", "cmpccxadd", "raoint", "rtm", "ptwrite", "pku", "ospke", "serialize", "waitpkg", "tsxldtrk", "user_shstk",
	} {
		if strings.HasPrefix(flag, prefix) {
			return true
		}
	}
	return false
}
