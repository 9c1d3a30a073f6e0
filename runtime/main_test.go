package runtime

import (
	"fmt"
	"os"
	"testing"

	"github.com/ocickpt/ocickpt/runtime/guardian"
)

// The test binary is also the guardian that it starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == guardian.Verb {
		guardian.Main()
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests must run as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
