package image

import (
	"strings"
	"testing"
)

func ownMounts() *Container {
	return &Container{Mounts: []Mount{
		{ID: 1, Parent: 0, Root: "/x", Point: "/"},
		{ID: 2, Parent: 3, Root: "/a", Point: "/t/b", Own: MountBind, From: 3},
		{ID: 3, Parent: 1, Root: "/", Point: "/t", FSType: "tmpfs", Own: MountNew},
		{ID: 4, Parent: 3, Root: "/x/etc", Point: "/t", Own: MountBind, From: 1},
	}}
}

// TestOwnMounts puts mounts behind what they stand on and come from.
func TestOwnMounts(t *testing.T) {
	list, err := ownMounts().OwnMounts()
	check(t, err)
	if len(list) != 3 || list[0].ID != 3 {
		t.Errorf("%+v", list)
	}
	for says, spoil := range map[string]func(m []Mount){
		"stands twice":        func(m []Mount) { m[3].ID = 2 },
		"unknown way":         func(m []Mount) { m[2].Own = "move" },
		"is no path":          func(m []Mount) { m[1].Point = "/t/../b" },
		"is not there":        func(m []Mount) { m[2].Parent = 9 },
		"does not lie in the": func(m []Mount) { m[1].Point = "/u" },
		"only a bind mount":   func(m []Mount) { m[2].From = 1 },
		"comes from another":  func(m []Mount) { m[3].From = 2 },
		"is not in mount":     func(m []Mount) { m[3].Root = "/y" },
		"in a circle":         func(m []Mount) { m[2].Parent, m[2].Point, m[3].Point = 4, "/t", "/t" },
	} {
		c := ownMounts()
		spoil(c.Mounts)
		if _, err := c.OwnMounts(); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
	}
	for path, want := range map[string]string{"/t": ".", "/t/a/b": "a/b", "/tt": "", "/": ""} {
		if rel, ok := Below(path, "/t"); rel != want && ok || ok != (want != "") {
			t.Errorf("%s: %q, %t", path, rel, ok)
		}
	}
	if rel, ok := Below("/a", "/"); rel != "a" || !ok {
		t.Errorf("%q, %t", rel, ok)
	}
}
