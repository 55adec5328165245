package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// endpointHealth has the JSON form of etcdctl's `endpoint health`.
type endpointHealth struct {
	Endpoint string `json:"endpoint"`
	Health   bool   `json:"health"`
	Took     string `json:"took"`
	Error    string `json:"error,omitempty"`
}

func newHealthCommand(client *clientOptions) *cobra.Command {
	var cluster bool
	cmd := &cobra.Command{
		Use:   "health",
		Short: "Check that nodes serve: a linearizable read through each of --endpoints",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			endpoints := client.endpoints
			if cluster {
				var err error
				if endpoints, err = client.clusterEndpoints(cmd.Context()); err != nil {
					return err
				}
			}
			results := make([]endpointHealth, len(endpoints))
			var all sync.WaitGroup
			for i, endpoint := range endpoints {
				all.Go(func() { results[i] = client.health(cmd.Context(), endpoint) })
			}
			all.Wait()
			return client.printer(cmd).health(cmd, results)
		},
	}
	cmd.Flags().BoolVar(&cluster, "cluster", false, "check all members of the cluster")
	return cmd
}

// health reads through one endpoint and asks for its alarms.
func (o *clientOptions) health(ctx context.Context, endpoint string) endpointHealth {
	result := endpointHealth{Endpoint: endpoint}
	start := time.Now()
	err := func() error {
		client, err := o.connectOne(ctx, endpoint)
		if err != nil {
			return err
		}
		defer client.Close()
		ctx, cancel := context.WithTimeout(ctx, o.commandTimeout)
		defer cancel()
		start = time.Now()
		_, err = client.Get(ctx, "health")
		result.Took = time.Since(start).String()
		if err != nil && !errors.Is(err, rpctypes.ErrPermissionDenied) {
			return err
		}
		alarms, err := client.AlarmList(ctx)
		if err != nil {
			return fmt.Errorf("ask for alarms: %w", err)
		}
		var names []string
		for _, alarm := range alarms.Alarms {
			names = append(names, alarm.GetAlarm().String())
		}
		if len(names) > 0 {
			return fmt.Errorf("alarm %s", strings.Join(names, ", "))
		}
		return nil
	}()
	if result.Took == "" {
		result.Took = time.Since(start).String()
	}
	if err != nil {
		result.Error = describe(nil, err)
	}
	result.Health = err == nil
	return result
}

// health prints the results. It returns an errUnhealthy if one is bad.
func (p *printer) health(cmd *cobra.Command, results []endpointHealth) error {
	var rows [][]string
	var bad []string
	for _, h := range results {
		rows = append(rows, []string{h.Endpoint, fmt.Sprint(h.Health), h.Took, h.Error})
		if !h.Health {
			bad = append(bad, h.Endpoint)
		}
		switch {
		case p.format != formatSimple:
		case h.Health:
			fmt.Fprintf(p.out, "%s is healthy: successfully committed proposal: took = %s\n", h.Endpoint, h.Took)
		default:
			fmt.Fprintf(cmd.ErrOrStderr(), "%s is unhealthy: failed to commit proposal: %s\n", h.Endpoint, h.Error)
		}
	}
	switch p.format {
	case formatJSON:
		if err := p.json(results); err != nil {
			return err
		}
	case formatTable:
		p.table([]string{"ENDPOINT", "HEALTH", "TOOK", "ERROR"}, rows)
	}
	if len(bad) > 0 {
		return fmt.Errorf("%w: %d of %d endpoints (%s): kvd status shows more", errUnhealthy, len(bad), len(results), strings.Join(bad, ", "))
	}
	return nil
}
