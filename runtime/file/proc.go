package file

import (
	"strconv"
	"strings"

	"github.com/ocickpt/ocickpt/image"
)

// pidInPath is the process that a path below a proc mount belongs to, as that
// mount numbers it, or 0. Such a file can be opened only once the process
// exists again.
func pidInPath(path string, mounts []image.Mount, mnt int) int32 {
	for i := range mounts {
		if mounts[i].ID != mnt {
			continue
		}
		rest, ok := strings.CutPrefix(path, strings.TrimSuffix(mounts[i].Point, "/")+"/")
		if !ok {
			return 0
		}
		first, _, _ := strings.Cut(rest, "/")
		pid, err := strconv.ParseInt(first, 10, 32)
		if err != nil {
			return 0
		}
		return int32(pid)
	}
	return 0
}
