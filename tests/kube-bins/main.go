// Kube-bins is the Kubernetes that our tests run against.
//
// Why it exists: a mock can only confirm what its author believed about the
// API server. Whether an EndpointSlice is accepted, whether a role is wide
// enough, and who wins when two writers disagree is decided by the real
// kube-apiserver, and whether the endpoints can be reached by the real
// kube-proxy. Not every place that runs the tests can fetch released binaries,
// but every place with a Go toolchain can build them: they are ordinary Go
// dependencies, so go.mod pins them and go.sum verifies them.
//
// The components are one program, chosen by its first argument, because they
// share nearly all of their code: three programs would link the same hundred
// megabytes three times. etcd is small and stands alone in cmd/etcd.
//
// Nothing here is shipped; nothing outside of tests/ may depend on it.
package main

import (
	"fmt"
	"os"
	"sort"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client metrics, as in the released programs
	_ "k8s.io/component-base/metrics/prometheus/version"  // the version metric, likewise
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubeproxy "k8s.io/kubernetes/cmd/kube-proxy/app"
)

// components maps the name a caller gives to the constructor of its command.
// They are constructors because building a command registers process-wide
// flags and feature gates: only the chosen one may run.
var components = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllermanager.NewControllerManagerCommand,
	"kube-proxy":              kubeproxy.NewProxyCommand,
	"kubectl":                 kubectl.NewDefaultKubectlCommand,
}

func main() {
	if len(os.Args) < 2 || components[os.Args[1]] == nil {
		fmt.Fprintf(os.Stderr, "usage: kube-bins {%s} [flags]\n", strings.Join(names(), "|"))
		os.Exit(2)
	}
	construct := components[os.Args[1]]
	// The components read os.Args themselves and expect to be called by their
	// own names, so the selector is dropped before they look.
	os.Args = os.Args[1:]
	os.Exit(cli.Run(construct()))
}

func names() []string {
	known := make([]string, 0, len(components))
	for name := range components {
		known = append(known, name)
	}
	sort.Strings(known)
	return known
}
