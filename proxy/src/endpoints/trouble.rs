//! What can go wrong between us and the API server, and no call that waits for ever.

use std::future::Future;
use std::time::Duration;

use kube::runtime::watcher;

/// An API server that answers at all answers well within this.
pub(super) const ANSWER: Duration = Duration::from_secs(10);

/// Why a call to the API server failed.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Trouble {
    /// The object is not as we last saw it.
    #[error("conflict: {0}")]
    Conflict(String),
    /// Our credentials, or what they allow, do not suffice.
    #[error("forbidden: {0}")]
    Forbidden(String),
    /// There is no such object.
    #[error("not found: {0}")]
    NotFound(String),
    /// The API server does not take such content.
    #[error("invalid: {0}")]
    Invalid(String),
    /// No answer in time.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// Anything else: refused connections, 5xx and the like.
    #[error("{0}")]
    Other(String),
}

impl Trouble {
    /// The name in metrics.
    pub(super) fn as_label(&self) -> &'static str {
        match self {
            Self::Conflict(_) => "conflict",
            Self::Forbidden(_) => "forbidden",
            Self::NotFound(_) => "not_found",
            Self::Invalid(_) => "invalid",
            Self::Timeout(_) => "timeout",
            Self::Other(_) => "error",
        }
    }

    /// Whether a look at the object as it is now, and another try, may well help.
    pub(super) fn is_stale_view(&self) -> bool {
        matches!(self, Self::Conflict(_) | Self::NotFound(_) | Self::Invalid(_))
    }

    fn from_status(status: &kube::core::Status) -> Self {
        let message = status.message.clone();
        match status.code {
            401 | 403 => Self::Forbidden(message),
            404 => Self::NotFound(message),
            409 => Self::Conflict(message),
            422 => Self::Invalid(message),
            code => Self::Other(format!("{code} {}: {message}", status.reason)),
        }
    }
}

impl From<kube::Error> for Trouble {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::from_status(&status),
            // Display of the outer error alone often says no more than "ServiceError".
            other => Self::Other(with_causes(&other)),
        }
    }
}

impl From<watcher::Error> for Trouble {
    fn from(error: watcher::Error) -> Self {
        use watcher::Error as E;
        match error {
            E::InitialListFailed(error) | E::WatchStartFailed(error) | E::WatchFailed(error) => {
                error.into()
            }
            E::WatchError(status) => Self::from_status(&status),
            E::NoResourceVersion => Self::Other(error.to_string()),
        }
    }
}

/// The error with its causes, each once: many errors repeat their cause's text.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// The call's answer, or [`Trouble::Timeout`] after [`ANSWER`].
pub(super) async fn in_time<T, E: Into<Trouble>>(
    call: impl Future<Output = Result<T, E>>,
) -> Result<T, Trouble> {
    match tokio::time::timeout(ANSWER, call).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(_) => Err(Trouble::Timeout(ANSWER)),
    }
}
