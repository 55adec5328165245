package metricset

import (
	"fmt"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	Set
	count prometheus.Counter
	by    *prometheus.CounterVec
}

func newMetrics() *metrics {
	m := &metrics{
		count: prometheus.NewCounter(prometheus.CounterOpts{Name: "count"}),
		by:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "by"}, []string{"what"}),
	}
	m.Add(m.count, m.by)
	return m
}

// total adds up what r gathers under a name; -1 if there is nothing.
func total(t *testing.T, r *prometheus.Registry, name string) (sum float64) {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum = -1
	for _, f := range families {
		if f.GetName() == name {
			sum = 0
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

func TestSetStaysForAsLongAsItHasUsers(t *testing.T) {
	r := prometheus.NewPedanticRegistry()
	of := func(group int) prometheus.Registerer {
		return prometheus.WrapRegistererWith(prometheus.Labels{"group": fmt.Sprint(group)}, r)
	}
	first, other := Join(of(1), newMetrics()), Join(of(2), newMetrics())
	first.count.Inc()
	other.count.Add(10)
	first.by.WithLabelValues("x").Inc()
	second := Join(of(1), newMetrics())
	if second != first || other == first {
		t.Fatal("not shared as the labels say")
	}
	first.Leave()
	second.count.Inc()
	if got := total(t, r, "count"); got != 12 {
		t.Errorf("counted %v", got)
	}
	second.Leave()
	second.Leave() // once too often
	if got := total(t, r, "count"); got != 10 || total(t, r, "by") != -1 {
		t.Errorf("counted %v after the last user has left", got)
	}
	third := Join(of(1), newMetrics())
	if third == first {
		t.Error("what was left is used again")
	}
	third.Leave()
	other.Leave()
	if families, err := r.Gather(); len(families) != 0 || err != nil {
		t.Errorf("left over: %v, %v", families, err)
	}
}

func TestSetWithoutARegistererOrWithForeignNames(t *testing.T) {
	m := newMetrics()
	if Join[*metrics](nil, m) != m {
		t.Error("another set")
	}
	m.Leave()
	r := prometheus.NewRegistry()
	r.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "count", Help: "of something else"}))
	if m := newMetrics(); Join[*metrics](r, m) != m {
		t.Error("another set")
	}
	m.Leave()
	foreign := newMetrics()
	r = prometheus.NewRegistry()
	r.MustRegister(struct{ prometheus.Collector }{foreign})
	if m := newMetrics(); Join[*metrics](r, m) != m {
		t.Error("a set of another type")
	}
	if families, err := r.Gather(); len(families) != 1 || err != nil {
		t.Errorf("%v, %v", families, err)
	}
}

func TestUsersComeAndGoAtOnce(t *testing.T) {
	r := prometheus.NewRegistry()
	var users sync.WaitGroup
	for range 8 {
		users.Go(func() {
			for range 200 {
				m := Join(r, newMetrics())
				m.count.Inc()
				if total(t, r, "count") < 1 {
					t.Error("not registered while in use")
				}
				m.Leave()
			}
		})
	}
	users.Wait()
	if families, err := r.Gather(); len(families) != 0 || err != nil {
		t.Errorf("left over: %v, %v", families, err)
	}
}

// keeper keeps what is registered.
type keeper struct{ prometheus.Registerer }

func (keeper) Unregister(prometheus.Collector) bool { return false }

func TestSetIsFoundAgainInARegistererThatKeepsIt(t *testing.T) {
	r := prometheus.NewPedanticRegistry()
	first := Join(keeper{r}, newMetrics())
	first.count.Inc()
	first.Leave()
	second := Join(keeper{r}, newMetrics())
	second.count.Inc()
	if second != first || total(t, r, "count") != 2 {
		t.Error("the next user has other metrics")
	}
	second.Leave()
}
