// Package rootfs finds what a container has changed in its root file system: an
// overlay keeps it apart, in its upper directory; of a plain directory a manifest
// says what there was before. Package tmpfs scans what it finds, and makes it
// again.
package rootfs

import (
	"os"
	"strings"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
)

// Source tells what a container has changed.
type Source interface {
	// Select begins a scan of the root file system. It refuses where that is not
	// what the source is about.
	Select(root *os.File) (tmpfs.Selection, error)
	Close() error
}

// Open finds out how the changes of a root file system, as the container's
// mountinfo has it, are told. The manifest may be "" for an overlay.
func Open(mount *image.Mount, manifest string) (Source, error) {
	switch {
	case manifest != "":
		return readManifest(manifest)
	case mount.FSType == "overlay":
		return openOverlay(mount)
	}
	return nil, fail.Refuse("root file system", "it is a directory of a file system of type "+mount.FSType+", which does not tell what has changed in it",
		"make a manifest of it before the container starts (ocickpt manifest) and give it with --rootfs-manifest")
}

// option is the value of a mount option in mountinfo, which has octal escapes
// (seq_show_option in the kernel).
func option(super, name string) string {
	for _, o := range strings.Split(super, ",") {
		if v, ok := strings.CutPrefix(o, name+"="); ok {
			return unescape(v)
		}
	}
	return ""
}

func unescape(s string) string {
	var out []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			var n int
			ok := true
			for _, c := range []byte(s[i+1 : i+4]) {
				ok = ok && c >= '0' && c <= '7'
				n = n<<3 | int(c-'0')
			}
			if ok && n < 256 {
				out, i = append(out, byte(n)), i+3
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}
