package fsm

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// gathered is how many metrics a registry has, and the value of one counter; -1 without it.
func gathered(t *testing.T, r *prometheus.Registry, name string) (families int, value float64) {
	t.Helper()
	all, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	value = -1
	for _, f := range all {
		if f.GetName() == name {
			value = f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	return len(all), value
}

func TestMetricsGoOnInTheNextStoreAndEndWithTheLast(t *testing.T) {
	const name = "kvd_fsm_applied_requests_total"
	r := prometheus.NewPedanticRegistry()
	config := func() Config {
		c := testConfig(tempPath(t))
		c.Registerer = prometheus.WrapRegistererWith(prometheus.Labels{"group": "7"}, r)
		return c
	}
	first := open(t, config())
	apply(t, first, put("a", "1"))
	second := open(t, config()) // as after an install
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	apply(t, second, put("a", "1"))
	if _, value := gathered(t, r, name); value != 2 {
		t.Errorf("counted %v", value)
	}
	for range 2 {
		if err := second.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n, _ := gathered(t, r, name); n != 0 {
		t.Errorf("%d metrics are left over", n)
	}
	c := config()
	c.Group = 3
	third := open(t, c)
	if err := third.Close(); err != nil {
		t.Fatal(err)
	}
	c.Group = 4
	if _, err := Open(c); err == nil {
		t.Error("opened another group's file")
	}
	if n, _ := gathered(t, r, name); n != 0 {
		t.Errorf("%d metrics are left over from a store that was not opened", n)
	}
}
