//! A client of the tenant's API server, once there is a configuration for one.

use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tracing::{debug, info, warn};

use crate::config::EndpointConfig;
use crate::metrics::Metrics;

/// First and longest pause between two looks for a configuration.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// See [`FIRST_PAUSE`].
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Bounds the set-up of a connection; answers are bounded where they are awaited.
const CONNECT: Duration = Duration::from_secs(5);

/// A connection without a byte for so long, while one is awaited, is dead.
const SILENCE: Duration = Duration::from_secs(75);

/// What is lacking.
#[derive(Debug, thiserror::Error)]
enum NoClient {
    #[error("{}", without_contents(.0))]
    Kubeconfig(#[from] KubeconfigError),
    #[error("{0}")]
    InCluster(#[from] kube::config::InClusterError),
    #[error("{0}")]
    Client(#[from] kube::Error),
}

/// What is wrong with a kubeconfig. A parser's words quote the file, tokens included.
fn without_contents(error: &KubeconfigError) -> String {
    match error {
        KubeconfigError::Parse(_) => "the kubeconfig cannot be parsed".to_owned(),
        other => other.to_string(),
    }
}

async fn try_client(config: &EndpointConfig) -> Result<Client, NoClient> {
    let mut settings = match &config.kubeconfig {
        Some(file) => {
            let kubeconfig = Kubeconfig::read_from(file)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?
        }
        // KUBERNETES_SERVICE_HOST and _PORT are set to the upstream, so this does not lead
        // through ourselves.
        None => Config::incluster()?,
    };
    settings.connect_timeout = Some(CONNECT);
    settings.write_timeout = Some(CONNECT);
    // A watch is never silent for longer, as it is renewed every minute.
    settings.read_timeout = Some(SILENCE);
    settings.reset_reader_on_write = true;
    // We have our own pauses, and bound each answer; hidden tries would use up that time.
    settings.default_retry = false;
    Ok(Client::try_from(settings)?)
}

/// Waits for a configuration: files of a service account may be mounted late, and traffic flows
/// without any.
pub(super) async fn client(config: &EndpointConfig, metrics: &Metrics) -> Client {
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match try_client(config).await {
            Ok(client) => {
                if pause > FIRST_PAUSE {
                    info!("found a Kubernetes configuration: endpoints are kept from now on");
                }
                return client;
            }
            Err(error) => error,
        };
        metrics.reconciles.with_label_values(&["no_config"]).inc();
        if pause == FIRST_PAUSE {
            warn!(
                %error,
                "no Kubernetes configuration, so the endpoints of default/kubernetes are not \
                 kept; traffic is relayed all the same. It needs --kubeconfig, or in a pod a \
                 service account's token and KUBERNETES_SERVICE_HOST and _PORT; \
                 --endpoint-mode=off does without. Trying again quietly"
            );
        } else {
            debug!(%error, "still no Kubernetes configuration");
        }
        tokio::time::sleep(pause.mul_f64(0.5 + 0.5 * fastrand::f64())).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
