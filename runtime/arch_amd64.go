package runtime

import (
	"bufio"
	"os"
	"strings"

	"github.com/ocickpt/ocickpt/image"
)

// machine describes this machine's processor as far as saved registers depend
// on it.
func machine() image.Arch {
	return image.Arch{PageSize: image.PageSize, Features: cpuFlags()}
}

// cpuFlags reads the first processor's flags. The others are not read: making
// up the text for all of them takes the kernel milliseconds on large machines.
func cpuFlags() []string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	for scan := bufio.NewScanner(f); scan.Scan(); {
		if key, value, ok := strings.Cut(scan.Text(), ":"); ok && strings.TrimSpace(key) == "flags" {
			return strings.Fields(value)
		}
	}
	return nil
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
	for _, prefix := range []string{
		"sse", "ssse", "avx", "amx", "fma", "aes", "vaes", "pclmul", "vpclmul", "bmi", "popcnt", "movbe", "abm", "lzcnt",
		"rdrand", "rdseed", "adx", "sha", "f16c", "xsave", "fsgsbase", "rdpid", "gfni", "cx16", "lahf", "mmx", "fxsr",
		"clflush", "clwb", "movdir", "erms", "fsrm", "pku", "ospke", "tsc_adjust", "rdtscp", "serialize", "waitpkg",
	} {
		if strings.HasPrefix(flag, prefix) {
			return true
		}
	}
	return false
}
