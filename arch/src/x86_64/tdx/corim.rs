//! Measurements as a CoRIM document (Concise Reference Integrity Manifest, draft-ietf-rats-corim), which verifiers read.

use ::corim::builder::{ComidBuilder, CorimBuilder};
use ::corim::error::BuilderError;
use ::corim::types::common::{MeasuredElement, TagIdChoice};
use ::corim::types::corim::CorimId;
use ::corim::types::environment::{ClassMap, EnvironmentMap};
use ::corim::types::measurement::{
    Digest, IntegrityRegisterId, IntegrityRegisters, MeasurementMap, MeasurementValuesMap,
};
use ::corim::types::triples::ReferenceTriple;
use igvm::corim::launch_measurement::{Error, LaunchMeasurement, MeasurementKind};
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader, IgvmRevision, IgvmSerializer};
use igvm_defs::{
    IGVM_TDX_PLATFORM_VERSION, IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};

use sha2::{Digest as _, Sha384};

use super::measure::{Digest384, mrtd};
use super::plan::LaunchPlan;

const PAGE_BYTES: usize = 4096;
/// SHA-384 (RFC 6920, §9.4).
const SHA384: i64 = 7;

/// A document without a signature: of MRTD, and of RTMR0 to 2 where they are known.
///
/// # Errors
/// What the crates that write it have against the plan.
pub fn document(plan: &LaunchPlan, registers: Option<&[Digest384; 3]>) -> Result<Vec<u8>, String> {
    match registers {
        Some(registers) => of_registers(mrtd(plan), registers).map_err(|error| error.to_string()),
        None => of_launch(plan),
    }
}

/// A document of no profile: that of launch measurements has one measurement, and Intel's is of platforms. The registers are
/// integrity registers by their numbers, 0 to 2.
fn of_registers(mrtd: Digest384, registers: &[Digest384; 3]) -> Result<Vec<u8>, BuilderError> {
    let all = registers.iter().fold(Sha384::new().chain_update(mrtd), |hash, register| hash.chain_update(register));
    let id = u128::from_be_bytes(*all.finalize().first_chunk().unwrap_or(&[0; 16]));
    let digests = |digest: &Digest384| vec![Digest::new(SHA384, digest.to_vec())];
    let measurement =
        |name: &str, mval| MeasurementMap { mkey: Some(MeasuredElement::Text(name.into())), mval, authorized_by: None };
    let launch = MeasurementValuesMap { digests: Some(digests(&mrtd)), ..MeasurementValuesMap::default() };
    let registers = (0..).zip(registers).map(|(number, digest)| (IntegrityRegisterId::Uint(number), digests(digest)));
    let registers = MeasurementValuesMap {
        integrity_registers: Some(IntegrityRegisters(registers.collect())),
        ..MeasurementValuesMap::default()
    };
    let class =
        ClassMap { class_id: None, vendor: Some("Intel".into()), model: Some("TDX".into()), layer: None, index: None };
    let environment = EnvironmentMap { class: Some(class), instance: None, group: None };
    let measurements = vec![measurement("MRTD", launch), measurement("RTMR", registers)];
    // The same measurements are the same document, and others another.
    let id = format!("Intel/TDX/{id:x}");
    let tag = ComidBuilder::new(TagIdChoice::Text(id.clone()))
        .add_reference_triple(ReferenceTriple::new(environment, measurements))
        .build()?;
    CorimBuilder::new(CorimId::Text(id)).add_comid_tag(tag)?.build_bytes()
}

/// A document of the profile of launch measurements, as IGVM files have it.
fn of_launch(plan: &LaunchPlan) -> Result<Vec<u8>, String> {
    let mask = 1;
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: mask,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::TDX,
        platform_version: IGVM_TDX_PLATFORM_VERSION,
        shared_gpa_boundary: 0,
    });
    let mut pages = Vec::new();
    for region in &plan.regions {
        let mut contents = region.contents.chunks(PAGE_BYTES);
        for gpa in (region.memory.start..region.memory.start + region.memory.len).step_by(PAGE_BYTES) {
            pages.push(IgvmDirectiveHeader::PageData {
                gpa,
                compatibility_mask: mask,
                flags: IgvmPageDataFlags::new().with_unmeasured(!region.measured),
                data_type: IgvmPageDataType::NORMAL,
                data: contents.next().unwrap_or_default().to_vec(),
            });
        }
    }
    let told = |error: igvm::Error| error.to_string();
    let file = IgvmFile::new(IgvmRevision::V1, vec![platform], Vec::new(), pages).map_err(told)?;
    let measurement = endorsed().map_err(|error| error.to_string())?;
    let mut serializer = IgvmSerializer::new(&file).map_err(told)?;
    serializer.add_corim(IgvmPlatformType::TDX, measurement.build()).map(<[u8]>::to_vec).map_err(told)
}

/// The launch measurement with a security version number, without which the profile has none: 0, the lowest.
fn endorsed() -> Result<LaunchMeasurement, Error> {
    let mut measurement = LaunchMeasurement::for_platform(IgvmPlatformType::TDX)?;
    measurement.set_measurement(MeasurementKind::Launch)?;
    measurement.endorse(0).with(MeasurementKind::Launch)?.finish()?;
    Ok(measurement)
}
