package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestCopiedUp restores a file system in memory that the engine does not mount
// empty: what was changed, removed and replaced in it by something else must be
// as it was, not as the engine makes it.
func TestCopiedUp(t *testing.T) {
	const script = `cd /data && rm gone && rm -r dir && echo own >dir && echo more >>changed && rm turned && mkdir turned &&
		echo x >turned/x && chmod 600 kept && ln kept linked && exec /bin/tree.sh`
	copied := func(c *container, spec *specs.Spec) {
		data := filepath.Join(c.rootfs(), "data")
		c.must(os.MkdirAll(filepath.Join(data, "dir"), 0o755))
		for _, name := range []string{"gone", "changed", "turned", "kept", "dir/below"} {
			c.must(os.WriteFile(filepath.Join(data, name), []byte(name+"\n"), 0o644))
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/data", Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup", "mode=755"}})
	}
	c := newContainer(t, withReport("tree"), withArgs("sh", "-c", script), copied).run()
	c.progress(5)
	look := []string{"sh", "-c", "cd /data && ls -lnAR --full-time . && cat changed dir kept turned/x"}
	before := c.exec(look...)
	for range 2 {
		c.checkpoint()
		c.mustBeGone()
		c.restore()
		c.progress(5)
		if after := c.exec(look...); after != before {
			t.Fatalf("before:\n%s\nafter:\n%s", before, after)
		}
	}
	if !strings.Contains(before, "changed\nmore\nown\nkept\nx\n") || strings.Contains(before, "below") {
		t.Errorf("the container does not hold what it should:\n%s", before)
	}
}
