package sock

import (
	"net/netip"
	"testing"
)

func TestReaddress(t *testing.T) {
	to := map[netip.Addr]netip.Addr{
		netip.MustParseAddr("10.0.0.1"): netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::1"): netip.MustParseAddr("fd00::2"),
	}
	for was, want := range map[string]string{
		"10.0.0.1:80": "10.0.0.2:80", "10.0.0.3:80": "10.0.0.3:80", "[fd00::1]:80": "[fd00::2]:80",
		"[::ffff:10.0.0.1]:80": "[::ffff:10.0.0.2]:80", "[::]:80": "[::]:80",
	} {
		raw := rawAddress(netip.MustParseAddrPort(was))
		if got := addressOf(Readdress(raw, to)).String(); got != want {
			t.Errorf("%s became %s, want %s", was, got, want)
		}
		if addressOf(raw).String() != was {
			t.Errorf("%s was changed in place", was)
		}
	}
	for _, raw := range [][]byte{nil, {2}, {2, 0, 0, 80}, make([]byte, 28)} {
		if got := Readdress(raw, to); string(got) != string(raw) {
			t.Errorf("%x became %x", raw, got)
		}
	}
}

// TestChecksum: the sum over a whole segment with its checksum in place is zero.
func TestChecksum(t *testing.T) {
	for _, family := range [][2]string{{"10.0.0.1:80", "10.0.0.2:8080"}, {"[fd00::1]:80", "[fd00::2]:8080"}} {
		s := &Segment{From: netip.MustParseAddrPort(family[0]), To: netip.MustParseAddrPort(family[1]), Seq: 0xdeadbeef, Ack: 77, Window: 9, Flags: flagACK}
		p := s.packet(s.From.Addr(), s.To.Addr())
		segment := p[len(p)-20:]
		pseudo := append(append(s.From.Addr().AsSlice(), s.To.Addr().AsSlice()...), 0, 6, 0, 20)
		if sum := checksum(append(pseudo, segment...)); sum != 0 {
			t.Errorf("%v: %#x", family, sum)
		}
	}
}
