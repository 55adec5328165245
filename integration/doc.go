// Package integration tests kvd as its users meet it: real processes that are killed, stopped, cut off and
// started again.
package integration
