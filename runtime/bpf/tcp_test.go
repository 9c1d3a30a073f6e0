package bpf

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestBetween(t *testing.T) {
	for _, c := range []struct {
		gaps, want []span
	}{
		{nil, []span{{0, 100}}},
		{[]span{{0, 10}, {5, 2}, {10, 5}, {50, 10}, {55, 10}}, []span{{15, 35}, {65, 35}}},
		{[]span{{90, 20}, {120, 10}}, []span{{0, 90}}},
	} {
		if diff := cmp.Diff(c.want, between(c.gaps, 100), cmp.AllowUnexported(span{})); diff != "" {
			t.Errorf("%v (-want +got)\n%s", c.gaps, diff)
		}
	}
}
