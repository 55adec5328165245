// Package kvdpb is the gRPC API that kvd has beyond etcd's, generated from admin.proto.
package kvdpb

//go:generate sh -c "cd ../.. && protoc --plugin=$DOLLAR(go tool -n protoc-gen-go) --plugin=$DOLLAR(go tool -n protoc-gen-go-grpc) --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative server/kvdpb/admin.proto"
