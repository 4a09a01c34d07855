package main

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/api/types"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// root is the project's directory, as seen from here.
const root = "../.."

// manifests is what k8s/ or a variant of it gives to Kubernetes.
type manifests struct {
	objects  []metav1.Object
	config   *corev1.ConfigMap // the environment
	peers    *corev1.ConfigMap // the list of nodes
	account  *corev1.ServiceAccount
	services map[string]*corev1.Service
	set      *appsv1.StatefulSet
	budget   *policyv1.PodDisruptionBudget
	policy   *networkingv1.NetworkPolicy
}

// decode reads YAML as the API server does, and more strictly: unknown and duplicate fields are errors.
func decode(t *testing.T, docs []byte) *manifests {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, networkingv1.AddToScheme, policyv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	m := &manifests{services: make(map[string]*corev1.Service)}
	for reader := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(docs))); ; {
		doc, err := reader.Read()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		object, _, err := decoder.Decode(doc, nil, nil)
		if err != nil {
			t.Fatalf("%v, in\n%s", err, doc)
		}
		switch o := object.(type) {
		case *corev1.ConfigMap:
			if strings.HasSuffix(o.Name, "-peers") {
				m.peers = o
			} else {
				m.config = o
			}
		case *corev1.ServiceAccount:
			m.account = o
		case *corev1.Service:
			m.services[o.Name] = o
		case *appsv1.StatefulSet:
			m.set = o
		case *policyv1.PodDisruptionBudget:
			m.budget = o
		case *networkingv1.NetworkPolicy:
			m.policy = o
		default:
			t.Fatalf("an object of a kind that no check knows: %T", o)
		}
		m.objects = append(m.objects, object.(metav1.Object))
	}
	if len(m.objects) != 8 || len(m.services) != 2 || m.config == nil || m.peers == nil {
		t.Fatalf("got %d objects, %d of them Services; want 8, which the checks know, with 2 Services and 2 ConfigMaps", len(m.objects), len(m.services))
	}
	if n := len(m.set.Spec.Template.Spec.Containers); n != 1 {
		t.Fatalf("got %d containers; want 1", n)
	}
	return m
}

func (m *manifests) pod() *corev1.PodSpec         { return &m.set.Spec.Template.Spec }
func (m *manifests) container() *corev1.Container { return &m.pod().Containers[0] }

// port returns the number of the container's port of that name, or 0.
func (m *manifests) port(name string) int32 {
	for _, p := range m.container().Ports {
		if p.Name == name {
			return p.ContainerPort
		}
	}
	return 0
}

// number resolves a port as Kubernetes does.
func (m *manifests) number(port intstr.IntOrString) int32 {
	if port.Type == intstr.String {
		return m.port(port.StrVal)
	}
	return port.IntVal
}

// podNames lists the names that the StatefulSet gives to its pods.
func (m *manifests) podNames() []string {
	var names []string
	for i := range *m.set.Spec.Replicas {
		names = append(names, fmt.Sprintf("%s-%d", m.set.Name, i))
	}
	return names
}

// env returns the environment of the pod of that name.
func (m *manifests) env(t *testing.T, pod string) map[string]string {
	t.Helper()
	env := make(map[string]string)
	for _, from := range m.container().EnvFrom {
		if from.ConfigMapRef == nil || from.ConfigMapRef.Name != m.config.Name {
			t.Fatalf("the environment comes from something else than the ConfigMap %s: %v", m.config.Name, from)
		}
		for name, value := range m.config.Data {
			env[name] = value
		}
	}
	for _, v := range m.container().Env {
		switch {
		case v.ValueFrom == nil:
			env[v.Name] = v.Value
		case v.ValueFrom.FieldRef != nil && v.ValueFrom.FieldRef.FieldPath == "metadata.name":
			env[v.Name] = pod
		case v.ValueFrom.ResourceFieldRef != nil && v.ValueFrom.ResourceFieldRef.Resource == "requests.memory":
			env[v.Name] = strconv.FormatInt(m.container().Resources.Requests.Memory().Value(), 10)
		default:
			t.Fatalf("%s comes from where no check knows of", v.Name)
		}
	}
	return env
}

// mountVolumes makes what the pods mount, Secrets as docs/kubernetes.md has them made, and lets env point to the files.
func (m *manifests) mountVolumes(t *testing.T, env map[string]string) {
	t.Helper()
	dir := t.TempDir()
	for _, volume := range m.pod().Volumes {
		made := filepath.Join(dir, volume.Name)
		if err := os.Mkdir(made, 0o700); err != nil {
			t.Fatal(err)
		}
		switch {
		case volume.Secret != nil:
			makeSecret(t, made, volume.Secret.SecretName)
		case volume.ConfigMap != nil && volume.ConfigMap.Name == m.peers.Name:
			for name, text := range m.peers.Data {
				if err := os.WriteFile(filepath.Join(made, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		default:
			t.Fatalf("the volume %s is of a kind that no check knows", volume.Name)
		}
		for _, mount := range m.container().VolumeMounts {
			for name, value := range env {
				if file, ok := strings.CutPrefix(value, mount.MountPath+"/"); ok && mount.Name == volume.Name {
					env[name] = filepath.Join(made, file)
				}
			}
		}
	}
}

// makeSecret makes the files of a Secret in dir.
func makeSecret(t *testing.T, dir, name string) {
	t.Helper()
	certs, err := filepath.Abs(root + "/_scripts/certs.sh")
	if err != nil {
		t.Fatal(err)
	}
	recipes := map[string]string{
		"raftstarter-tls": certs + " . raftstarter,raftstarter-0.raftstarter-headless,raftstarter-1.raftstarter-headless,raftstarter-2.raftstarter-headless && " +
			"mv raftstarter.pem tls.crt && mv raftstarter-key.pem tls.key && mv ca.pem ca.crt",
		"raftstarter-tokens": "openssl rand -hex 32 >tokens",
	}
	recipe := exec.CommandContext(t.Context(), "bash", "-c", "umask 077; "+recipes[name])
	recipe.Dir = dir
	if out, err := recipe.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// allManifests returns those of k8s/, and of every variant that kustomize makes of it, by its name.
func allManifests(t *testing.T) map[string]*manifests {
	t.Helper()
	files, err := filepath.Glob(root + "/k8s/*")
	if err != nil {
		t.Fatal(err)
	}
	var docs [][]byte
	for _, file := range files {
		if filepath.Base(file) == "variants" {
			continue
		}
		if filepath.Ext(file) != ".yaml" {
			t.Errorf("%s: kubectl apply -f k8s/ passes over it", file)
		}
		doc, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		docs = append(docs, doc)
	}
	all := map[string]*manifests{"base": decode(t, bytes.Join(docs, []byte("\n---\n")))}
	variants, err := filepath.Glob(root + "/k8s/variants/*/kustomization.yaml")
	if err != nil || len(variants) == 0 {
		t.Fatalf("no variants; error %v", err)
	}
	for _, file := range variants {
		options := krusty.MakeDefaultOptions()
		options.LoadRestrictions = types.LoadRestrictionsNone
		resources, err := krusty.MakeKustomizer(options).Run(filesys.MakeFsOnDisk(), filepath.Dir(file))
		if err != nil {
			t.Fatal(err)
		}
		docs, err := resources.AsYaml()
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(filepath.Dir(file))] = decode(t, docs)
	}
	return all
}

func TestObjectsAreOfAnyNamespaceAndCarryTheLabel(t *testing.T) {
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			for _, o := range m.objects {
				if o.GetNamespace() != "" {
					t.Errorf("%T %s is bound to the namespace %s", o, o.GetName(), o.GetNamespace())
				}
				if got := o.GetLabels()["app.kubernetes.io/name"]; got != "raftstarter" { // uninstall.sh and k8s-test.sh go by it
					t.Errorf("%T %s has the label %q", o, o.GetName(), got)
				}
			}
		})
	}
}

func TestPeersAreThePods(t *testing.T) {
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			headless := m.services[m.set.Spec.ServiceName]
			if headless == nil || headless.Spec.ClusterIP != corev1.ClusterIPNone || !headless.Spec.PublishNotReadyAddresses {
				t.Fatalf("the StatefulSet's Service %q is not there, has a cluster IP, or hides pods that are not ready", m.set.Spec.ServiceName)
			}
			if m.set.Spec.Ordinals != nil || m.set.Spec.PodManagementPolicy != appsv1.ParallelPodManagement {
				t.Error("the pods are not numbered from 0, or wait for one another to start")
			}
			var want []string
			for _, pod := range m.podNames() {
				want = append(want, fmt.Sprintf("%s@%s.%s:%d", pod, pod, headless.Name, m.port("raft")))
				if got := m.env(t, pod)["NODE_ID"]; got != pod {
					t.Errorf("%s has the NODE_ID %q", pod, got)
				}
			}
			if got := strings.Fields(m.peers.Data["peers"]); !slices.Equal(got, want) {
				t.Errorf("got the list %q; want %q", got, want)
			}
		})
	}
}

// A change of the list reaches the pods as a file that changes, so it must be mounted as kubelet keeps it up to date.
func TestPeersReachRunningPods(t *testing.T) {
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			env := m.env(t, "raftstarter-0") // refuses an environment that comes from the list
			i := slices.IndexFunc(m.pod().Volumes, func(v corev1.Volume) bool { return v.ConfigMap != nil && v.ConfigMap.Name == m.peers.Name })
			if i < 0 || len(m.pod().Volumes[i].ConfigMap.Items) > 0 || m.peers.Immutable != nil {
				t.Fatalf("the ConfigMap %s is no volume, only a part of it is, or it cannot change", m.peers.Name)
			}
			for _, mount := range m.container().VolumeMounts {
				if mount.Name == m.pod().Volumes[i].Name && mount.SubPath == "" && env["PEERS_FILE"] == mount.MountPath+"/peers" {
					return
				}
			}
			t.Errorf("PEERS_FILE %q is no file of the ConfigMap %s, or is mounted by a subPath", env["PEERS_FILE"], m.peers.Name)
		})
	}
}

func TestPorts(t *testing.T) {
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			env := m.env(t, "raftstarter-0")
			want := map[string]string{"http": cmp.Or(env["HTTP_PORT"], "11000"), "raft": cmp.Or(env["RAFT_PORT"], "12000")}
			for name, number := range want {
				if got := fmt.Sprint(m.port(name)); got != number {
					t.Errorf("the container's port %s is %s; the service listens on %s", name, got, number)
				}
			}
			for _, service := range m.services {
				for _, port := range service.Spec.Ports {
					if got := m.number(port.TargetPort); got == 0 || port.Name == "http" && port.Port != 11000 || got != m.port(port.Name) {
						t.Errorf("the port %s of the Service %s is %d and leads to %d", port.Name, service.Name, port.Port, got)
					}
				}
			}
			if client := m.services["raftstarter"]; client.Spec.PublishNotReadyAddresses || len(client.Spec.Ports) != 1 || client.Spec.Ports[0].Name != "http" {
				t.Error("the clients' Service has more than the HTTP port, or leads to pods that are not ready")
			}
		})
	}
}

func TestSelectors(t *testing.T) {
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			pods := labels.Set(m.set.Spec.Template.Labels)
			selectors := map[string]*metav1.LabelSelector{
				"StatefulSet":         m.set.Spec.Selector,
				"PodDisruptionBudget": m.budget.Spec.Selector,
				"NetworkPolicy":       &m.policy.Spec.PodSelector,
			}
			for name, service := range m.services {
				selectors["Service "+name] = &metav1.LabelSelector{MatchLabels: service.Spec.Selector}
			}
			for _, c := range m.pod().TopologySpreadConstraints {
				selectors["spread over "+c.TopologyKey] = c.LabelSelector
			}
			for name, s := range selectors {
				selector, err := metav1.LabelSelectorAsSelector(s)
				if err != nil || selector.Empty() || !selector.Matches(pods) {
					t.Errorf("%s: %v does not select the pods, or selects others too; error %v", name, selector, err)
				}
			}
			if m.pod().ServiceAccountName != m.account.Name || *m.account.AutomountServiceAccountToken {
				t.Error("the pods have another account, or one with a token")
			}
		})
	}
}

// The Raft port is for the pods alone, the HTTP port is not closed to anyone.
func TestNetworkPolicy(t *testing.T) {
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			open := make(map[int32]bool)
			for _, rule := range m.policy.Spec.Ingress {
				if len(rule.Ports) == 0 {
					t.Error("a rule opens all ports")
				}
				for _, port := range rule.Ports {
					number := m.number(*port.Port)
					open[number] = true
					if number == m.port("http") {
						continue
					}
					if len(rule.From) == 0 {
						t.Errorf("port %d is open to all", number)
					}
					for _, peer := range rule.From {
						if peer.PodSelector == nil || peer.NamespaceSelector != nil || !sameLabels(peer.PodSelector, m.set.Spec.Selector) {
							t.Errorf("port %d is open to %v", number, peer)
						}
					}
				}
			}
			if !open[m.port("http")] || !open[m.port("raft")] || len(open) != 2 {
				t.Errorf("got the ports %v; want those of HTTP and Raft", open)
			}
		})
	}
}

func sameLabels(a, b *metav1.LabelSelector) bool {
	return metav1.FormatLabelSelector(a) == metav1.FormatLabelSelector(b)
}

func TestTimeToStop(t *testing.T) {
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			timeout, err := time.ParseDuration(m.config.Data["SHUTDOWN_TIMEOUT"])
			if err != nil {
				t.Fatal(err)
			}
			sleep := time.Duration(m.container().Lifecycle.PreStop.Sleep.Seconds) * time.Second
			grace := time.Duration(*m.pod().TerminationGracePeriodSeconds) * time.Second
			if grace < sleep+timeout+2*time.Second {
				t.Errorf("a pod gets %v to end; it sleeps for %v, and the service may take %v", grace, sleep, timeout)
			}
		})
	}
}

func TestBudgetLeavesAMajority(t *testing.T) {
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			if got, most := m.budget.Spec.MaxUnavailable.IntVal, (*m.set.Spec.Replicas-1)/2; got < 1 || got > most {
				t.Errorf("the budget lets %d pods go; want 1 to %d", got, most)
			}
		})
	}
}

func TestMemory(t *testing.T) {
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			limit := m.container().Resources.Limits.Memory().Value()
			goLimit, err := strconv.ParseInt(m.env(t, "raftstarter-0")["GOMEMLIMIT"], 10, 64)
			if err != nil || goLimit > limit*9/10 || goLimit < limit/2 {
				t.Errorf("GOMEMLIMIT is %d, of a limit of %d; want half of it to nine tenths; error %v", goLimit, limit, err)
			}
		})
	}
}

func TestState(t *testing.T) {
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			env, claims := m.env(t, "raftstarter-0"), m.set.Spec.VolumeClaimTemplates
			if env["KV_STORE"] == "memory" {
				if len(claims) != 0 || env["STATE_DIR"] != "" {
					t.Error("a memory store has volumes or a STATE_DIR")
				}
				return
			}
			retention := m.set.Spec.PersistentVolumeClaimRetentionPolicy
			if len(claims) != 1 || retention.WhenDeleted != appsv1.RetainPersistentVolumeClaimRetentionPolicyType || retention.WhenScaled != retention.WhenDeleted {
				t.Fatalf("want one claim, that is always kept; got %v, %v", claims, retention)
			}
			i := slices.IndexFunc(m.container().VolumeMounts, func(v corev1.VolumeMount) bool { return v.Name == claims[0].Name })
			if i < 0 || filepath.Dir(env["STATE_DIR"]) != m.container().VolumeMounts[i].MountPath {
				t.Errorf("STATE_DIR %q is not a directory in the volume", env["STATE_DIR"])
			}
		})
	}
}

// TestService checks the manifests against the service itself: it takes their configuration, and it has the paths of the probes.
func TestService(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "raftstarter")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-C", root, "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	help, err := exec.CommandContext(t.Context(), binary, "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	for variant, m := range allManifests(t) {
		t.Run(variant, func(t *testing.T) {
			for name := range m.config.Data {
				if !bytes.Contains(help, []byte("\n  "+name)) {
					t.Errorf("the ConfigMap has %s, which the service does not know", name)
				}
			}
			for _, pod := range m.podNames() {
				env := m.env(t, pod)
				m.mountVolumes(t, env)
				command := exec.CommandContext(t.Context(), binary, "--healthcheck") // it exits 2 when the configuration will not do
				command.Env = environ(env)
				if out, err := command.CombinedOutput(); command.ProcessState.ExitCode() == 2 {
					t.Errorf("%s: %v\n%s", pod, err, out)
				}
			}

			env := m.env(t, "raftstarter-0")
			m.mountVolumes(t, env)
			env["HTTP_ADDR"], env["HTTP_PORT"], env["RAFT_ADDR"], env["RAFT_PORT"] = "127.0.0.1", freePort(t), "127.0.0.1", freePort(t)
			env["STATE_DIR"] = t.TempDir()
			node := exec.CommandContext(t.Context(), binary)
			node.Env = environ(env)
			node.Stderr = t.Output()
			if err := node.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = node.Wait() }) // the test's context, which ends before, kills it
			c := m.container()
			for name, probe := range map[string]*corev1.Probe{"startup": c.StartupProbe, "liveness": c.LivenessProbe, "readiness": c.ReadinessProbe} {
				if m.number(probe.HTTPGet.Port) != m.port("http") {
					t.Errorf("the %s probe asks port %v", name, probe.HTTPGet.Port)
				}
				scheme := cmp.Or(strings.ToLower(string(probe.HTTPGet.Scheme)), "http")
				status := get(t, scheme+"://127.0.0.1:"+env["HTTP_PORT"]+probe.HTTPGet.Path)
				// Alone, with peers whose names nobody knows, a node lives and is not ready.
				if want := map[bool]int{true: http.StatusServiceUnavailable, false: http.StatusOK}[name == "readiness"]; status != want {
					t.Errorf("the %s probe's path %s is answered %d; want %d", name, probe.HTTPGet.Path, status, want)
				}
			}
		})
	}
}

func environ(env map[string]string) []string {
	var all []string
	for name, value := range env {
		all = append(all, name+"="+value)
	}
	return all
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// get returns the status of the answer, which a process that has just been started may take a moment to give.
func get(t *testing.T, url string) int {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // as kubelet does
	defer client.CloseIdleConnections()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(request)
		if err == nil {
			_ = response.Body.Close()
			return response.StatusCode
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}
