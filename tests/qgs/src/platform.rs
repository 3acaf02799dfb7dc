//! A platform: its module, its quoting enclave, the certificates from its key to a root, and the collateral that a verifier
//! wants (Intel's DCAP: quote version 4, PCK certificates, TCB info, QE identity).

use anyhow::{Result, anyhow};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, CrlDistributionPoint,
    CustomExtension, DistinguishedName, DnType, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SerialNumber, date_time_ymd,
};
use ring::digest::{SHA256, digest};
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

use crate::der::{SGX_EXTENSION, Sgx};
use crate::report::{self, CPU_SVN, DATA, PLATFORM, Registers, TEE_TCB_SVN, TRUST_DOMAIN};

const PCE_SVN: u8 = 11;
const FMSPC: [u8; 6] = [0xb0, 0xc0, 0x6f, 0, 0, 0];
/// Who signed the quoting enclave, its product number and its security version.
const QE_SIGNER: [u8; 32] = [0xdc; 32];
const QE_PRODUCT: u16 = 2;
const QE_SVN: u16 = 4;
/// SGX's ATTRIBUTES of an initialized enclave in 64-bit mode with a provisioning key.
const QE_ATTRIBUTES: [u8; 16] = [0x15, 0, 0, 0, 0, 0, 0, 0, 0xe7, 0, 0, 0, 0, 0, 0, 0];
/// Intel's quoting enclave.
const VENDOR: [u8; 16] =
    [0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07];
/// Where the root's list of revoked certificates would be fetched.
const REVOKED: &str = "https://quotes.example/root.crl";
/// When everything here was issued, and until when it is valid.
const ISSUED: &str = "2024-01-01T00:00:00Z";
const NEXT: &str = "2048-12-31T00:00:00Z";

/// A certificate with its key.
struct Identity {
    params: CertificateParams,
    certificate: Certificate,
    key: KeyPair,
}

impl Identity {
    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    /// Signs as quotes and collateral have it: both numbers of 32 bytes.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>> {
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &self.key.serialize_der(), &random)
            .map_err(|error| anyhow!("a key: {error}"))?;
        let signature = key.sign(&random, message).map_err(|_| anyhow!("a signature"))?;
        Ok(signature.as_ref().to_vec())
    }
}

/// A platform whose quotes can be checked.
pub struct Platform {
    root: Identity,
    intermediate: Identity,
    /// That of the platform's provisioning certification key.
    leaf: Identity,
    /// Signs what is said of platforms.
    collateral: Identity,
    /// The quoting enclave's own, which no certificate is for.
    attestation: Identity,
    module: hmac::Key,
}

impl Platform {
    /// A platform with new keys.
    ///
    /// # Errors
    /// There is no randomness.
    pub fn new() -> Result<Self> {
        let root = self_signed("Intel SGX Root CA")?;
        let intermediate = issued("Intel SGX PCK Platform CA", &root, true, None)?;
        let sgx = Sgx { ppid: [0x0f; 16], cpu_svn: CPU_SVN, pce_svn: PCE_SVN, fmspc: FMSPC };
        let leaf = issued("Intel SGX PCK Certificate", &intermediate, false, Some(sgx))?;
        let collateral = issued("Intel SGX TCB Signing", &root, false, None)?;
        let attestation = self_signed("the quoting enclave")?;
        let module = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new()).map_err(|_| anyhow!("randomness"))?;
        Ok(Self { root, intermediate, leaf, collateral, attestation, module })
    }

    /// The report that the module makes of a trust domain.
    pub fn report(&self, registers: &Registers) -> [u8; report::LEN] {
        report::report(&self.module, registers)
    }

    /// The root's certificate, as PEM.
    pub fn root_pem(&self) -> String {
        self.root.certificate.pem()
    }

    /// The root's certificate, as DER.
    pub fn root_der(&self) -> Vec<u8> {
        self.root.certificate.der().to_vec()
    }

    /// A quote of a report; `None` where the report is not one of this platform's module.
    ///
    /// # Errors
    /// A signature cannot be made.
    pub fn quote(&self, report: &[u8; report::LEN]) -> Result<Option<Vec<u8>>> {
        if !report::is_genuine(&self.module, report) {
            return Ok(None);
        }
        let mut quote = header();
        // The module's versions, its measurement, its signer's and its attributes; the TD; the TD's data.
        quote.extend_from_slice(&report[PLATFORM + 8..PLATFORM + 120]);
        quote.extend_from_slice(&[0; 8]);
        quote.extend_from_slice(&report[TRUST_DOMAIN..TRUST_DOMAIN + 400]);
        quote.extend_from_slice(&report[DATA..DATA + 64]);

        let point = self.attestation.key.public_key_raw();
        let key = point.strip_prefix(&[4]).ok_or_else(|| anyhow!("a compressed point"))?;
        let more = [0x5c; 32];
        let enclave = enclave_report(&digest_of(&[key, &more].concat()));
        let chain = [&self.leaf, &self.intermediate, &self.root].map(|identity| identity.certificate.pem()).concat();
        let certified = [
            &enclave[..],
            &self.leaf.sign(&enclave)?,
            &32_u16.to_le_bytes(),
            &more,
            &5_u16.to_le_bytes(),
            &u32::try_from(chain.len())?.to_le_bytes(),
            chain.as_bytes(),
        ]
        .concat();
        let signature = [
            &self.attestation.sign(&quote)?,
            key,
            &6_u16.to_le_bytes(),
            &u32::try_from(certified.len())?.to_le_bytes(),
            &certified,
        ]
        .concat();
        quote.extend_from_slice(&u32::try_from(signature.len())?.to_le_bytes());
        quote.extend_from_slice(&signature);
        Ok(Some(quote))
    }

    /// What a verifier wants beside the quote, in one object, as tools that fetch it from Intel's service write it.
    ///
    /// # Errors
    /// A signature cannot be made.
    pub fn collateral(&self) -> Result<Value> {
        let (tcb, qe) = (tcb_info().to_string(), qe_identity().to_string());
        let signers = [&self.collateral, &self.root].map(|identity| identity.certificate.pem()).concat();
        let cas = [&self.intermediate, &self.root].map(|identity| identity.certificate.pem()).concat();
        Ok(json!({
            "pck_crl_issuer_chain": cas,
            "root_ca_crl": hex(&revoked(&self.root)?),
            "pck_crl": hex(&revoked(&self.intermediate)?),
            "tcb_info_issuer_chain": signers,
            "tcb_info_signature": hex(&self.collateral.sign(tcb.as_bytes())?),
            "tcb_info": tcb,
            "qe_identity_issuer_chain": signers,
            "qe_identity_signature": hex(&self.collateral.sign(qe.as_bytes())?),
            "qe_identity": qe,
        }))
    }
}

/// A quote's first 48 bytes: version 4, an ECDSA key of P-256, TDX.
fn header() -> Vec<u8> {
    let mut header =
        [4_u16, 2, 0x81, 0, QE_SVN, PCE_SVN.into()].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    header.extend_from_slice(&VENDOR);
    header.extend_from_slice(&[0; 20]);
    header
}

/// The quoting enclave's report of itself, with this in its data (Intel SGX, REPORT's body: 384 bytes).
fn enclave_report(data: &[u8; 32]) -> [u8; 384] {
    let mut report = [0; 384];
    let mut put = |at: usize, bytes: &[u8]| report[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &CPU_SVN);
    put(48, &QE_ATTRIBUTES);
    put(64, &[0xe5; 32]);
    put(128, &QE_SIGNER);
    put(256, &QE_PRODUCT.to_le_bytes());
    put(258, &QE_SVN.to_le_bytes());
    put(320, data);
    report
}

/// How platforms like this one are.
fn tcb_info() -> Value {
    let components = |svns: &[u8; 16]| svns.iter().map(|svn| json!({ "svn": svn })).collect::<Vec<_>>();
    let tcb = json!({
        "sgxtcbcomponents": components(&CPU_SVN),
        "pcesvn": PCE_SVN,
        "tdxtcbcomponents": components(&TEE_TCB_SVN),
    });
    json!({
        "id": "TDX", "version": 3, "issueDate": ISSUED, "nextUpdate": NEXT,
        "fmspc": hex(&FMSPC), "pceId": "0000", "tcbType": 0, "tcbEvaluationDataNumber": 17,
        "tdxModule": {
            "mrsigner": hex(&[0; 48]), "attributes": hex(&[0; 8]), "attributesMask": hex(&[0xff; 8]),
        },
        "tdxModuleIdentities": [],
        "tcbLevels": [{ "tcb": tcb, "tcbDate": ISSUED, "tcbStatus": "UpToDate" }],
    })
}

/// How the quoting enclave is.
fn qe_identity() -> Value {
    let mask = [0xfb, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
    let attributes = QE_ATTRIBUTES.iter().zip(mask).map(|(attribute, mask)| attribute & mask).collect::<Vec<u8>>();
    json!({
        "id": "TD_QE", "version": 2, "issueDate": ISSUED, "nextUpdate": NEXT, "tcbEvaluationDataNumber": 17,
        "miscselect": "00000000", "miscselectMask": "ffffffff",
        "attributes": hex(&attributes), "attributesMask": hex(&mask),
        "mrsigner": hex(&QE_SIGNER), "isvprodid": QE_PRODUCT,
        "tcbLevels": [{ "tcb": { "isvsvn": QE_SVN }, "tcbDate": ISSUED, "tcbStatus": "UpToDate" }],
    })
}

/// A list of revoked certificates of an issuer's, with none in it.
fn revoked(issuer: &Identity) -> Result<Vec<u8>> {
    let params = CertificateRevocationListParams {
        this_update: date_time_ymd(2024, 1, 1),
        next_update: date_time_ymd(2048, 12, 31),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    Ok(params.signed_by(&issuer.issuer())?.der().to_vec())
}

/// The names are Intel's, which verifiers look for.
fn params(name: &str, issuer: bool) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut names = DistinguishedName::new();
    for (kind, value) in [
        (DnType::CommonName, name),
        (DnType::OrganizationName, "Intel Corporation"),
        (DnType::LocalityName, "Santa Clara"),
        (DnType::StateOrProvinceName, "CA"),
        (DnType::CountryName, "US"),
    ] {
        names.push(kind, value);
    }
    params.distinguished_name = names;
    (params.not_before, params.not_after) = (date_time_ymd(2024, 1, 1), date_time_ymd(2049, 12, 31));
    params.use_authority_key_identifier_extension = true;
    params.crl_distribution_points = vec![CrlDistributionPoint { uris: vec![REVOKED.into()] }];
    if issuer {
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    } else {
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::ContentCommitment];
    }
    params
}

fn self_signed(name: &str) -> Result<Identity> {
    let (params, key) = (params(name, true), KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
    let certificate = params.self_signed(&key)?;
    Ok(Identity { params, certificate, key })
}

fn issued(name: &str, by: &Identity, issuer: bool, sgx: Option<Sgx>) -> Result<Identity> {
    let (mut params, key) = (params(name, issuer), KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
    params.custom_extensions =
        sgx.iter().map(|sgx| CustomExtension::from_oid_content(&SGX_EXTENSION, sgx.der())).collect();
    let certificate = params.signed_by(&key, &by.issuer())?;
    Ok(Identity { params, certificate, key })
}

fn digest_of(bytes: &[u8]) -> [u8; 32] {
    let mut sum = [0; 32];
    sum.copy_from_slice(digest(&SHA256, bytes).as_ref());
    sum
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
