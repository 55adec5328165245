package server

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

// unsupportedServices are etcd's services that kvd does not have. They are
// registered so that clients are told so, in the same words everywhere.
var unsupportedServices = []struct {
	desc *grpc.ServiceDesc
	err  error
}{
	{&pb.Auth_ServiceDesc, unsupported("users, roles and authentication are")},
}

// refuseAll registers a service whose every method fails with err.
func refuseAll(server *grpc.Server, service *grpc.ServiceDesc, err error) {
	desc := grpc.ServiceDesc{ServiceName: service.ServiceName, Metadata: service.Metadata}
	for _, m := range service.Methods {
		desc.Methods = append(desc.Methods, grpc.MethodDesc{
			MethodName: m.MethodName,
			Handler: func(_ any, ctx context.Context, _ func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
				info := &grpc.UnaryServerInfo{FullMethod: "/" + service.ServiceName + "/" + m.MethodName}
				return intercept(ctx, nil, info, func(context.Context, any) (any, error) { return nil, err })
			},
		})
	}
	for _, m := range service.Streams {
		m.Handler = func(any, grpc.ServerStream) error { return err }
		desc.Streams = append(desc.Streams, m)
	}
	server.RegisterService(&desc, nil)
}
