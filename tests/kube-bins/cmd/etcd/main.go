// Etcd is the store behind the kube-apiserver of our tests. It is built from
// the same go.mod as the API server, and therefore from the etcd version that
// this Kubernetes release was itself compiled against.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
