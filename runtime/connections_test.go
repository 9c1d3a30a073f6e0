package runtime

import "testing"

func TestParseAddressMap(t *testing.T) {
	m, err := ParseAddressMap([]string{"10.0.0.1=10.0.0.2", "fd00::1=fd00::2"})
	if err != nil || len(m) != 2 {
		t.Errorf("%v, %v", m, err)
	}
	for _, bad := range []string{"", "10.0.0.1", "10.0.0.1=", "10.0.0.1=fd00::1", "a=b", "10.0.0.1/8=10.0.0.2/8"} {
		if _, err := ParseAddressMap([]string{bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
