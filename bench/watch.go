package bench

import "context"

func (r *run) watch(ctx context.Context) (*Result, error) { return nil, ErrNoWatch }
