package integration

import "testing"

// TestCrowd takes 1,000 processes and a process of 2,000 threads on the journey.
func TestCrowd(t *testing.T) {
	const processes = 1000
	c := newContainer(t, withReport("crowd"), withArgs("/bin/crowd", "1000", "2000")).run()
	c.progress(2)
	before := c.tree()
	if len(before) != processes+2 {
		t.Fatalf("there are %d processes", len(before))
	}
	for range 2 {
		c.checkpoint()
		c.mustBeGone()
		c.restore()
		c.sameTree(before)
		c.progress(2)
	}
}
