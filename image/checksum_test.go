package image

import (
	"math/rand/v2"
	"testing"
)

func TestJoined(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		b := make([]byte, random.IntN(10000))
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		cut := random.IntN(len(b) + 1)
		if got, want := joined(Checksum(b[:cut]), Checksum(b[cut:]), len(b)-cut), Checksum(b); got != want {
			t.Fatalf("%d and %d bytes: %#x, want %#x", cut, len(b)-cut, got, want)
		}
	}
}
