//! The certificates and keys of one throw-away cluster, written as PEM files.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};

/// A certificate and its private key, as files in PEM form.
pub(super) struct Pair {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// Everything the control plane needs to trust itself and its clients.
pub(super) struct Pki {
    pub ca: PathBuf,
    pub ca_pem: String,
    pub serving: Pair,
    pub admin: Pair,
    pub controller_manager: Pair,
    pub service_account_private: PathBuf,
    pub service_account_public: PathBuf,
}

/// The names under which pods and hosts look for an API server. A test that
/// reaches it through a proxy on any of them verifies the certificate unchanged.
const DNS_NAMES: [&str; 5] = [
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
];

impl Pki {
    /// Generates all keys (P-256: RSA would cost seconds per test) below `dir`.
    /// `addresses` are the IP names of the serving certificate.
    ///
    /// # Errors
    /// When a key cannot be generated or a file cannot be written.
    pub fn generate(dir: &Path, addresses: &[IpAddr]) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let authority = authority()?;
        let ca = write(dir, "ca.crt", &authority.pem())?;

        let mut serving = subject("kube-apiserver", None, ExtendedKeyUsagePurpose::ServerAuth);
        for name in DNS_NAMES {
            serving.subject_alt_names.push(SanType::DnsName(name.try_into()?));
        }
        serving.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));

        // system:masters is the group that RBAC never refuses.
        let admin = subject("admin", Some("system:masters"), ExtendedKeyUsagePurpose::ClientAuth);
        // The bootstrap policy already binds a role to this user name.
        let manager =
            subject("system:kube-controller-manager", None, ExtendedKeyUsagePurpose::ClientAuth);

        let tokens = KeyPair::generate()?;
        Ok(Self {
            ca,
            ca_pem: authority.pem(),
            serving: issue(dir, "apiserver", &serving, &authority)?,
            admin: issue(dir, "admin", &admin, &authority)?,
            controller_manager: issue(dir, "controller-manager", &manager, &authority)?,
            service_account_private: write(dir, "sa.key", &tokens.serialize_pem())?,
            service_account_public: write(dir, "sa.pub", &tokens.public_key_pem())?,
        })
    }
}

fn authority() -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "test-cluster-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

/// A leaf for user (or server) `name`. The API server reads the user from the
/// common name and the groups from the organizations.
fn subject(name: &str, group: Option<&str>, usage: ExtendedKeyUsagePurpose) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    if let Some(group) = group {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params
}

fn issue(
    dir: &Path,
    stem: &str,
    params: &CertificateParams,
    authority: &CertifiedIssuer<'static, KeyPair>,
) -> Result<Pair> {
    let key = KeyPair::generate()?;
    let cert = params.signed_by(&key, authority)?;
    Ok(Pair {
        cert: write(dir, &format!("{stem}.crt"), &cert.pem())?,
        key: write(dir, &format!("{stem}.key"), &key.serialize_pem())?,
    })
}

fn write(dir: &Path, name: &str, pem: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    fs::write(&path, pem).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}
